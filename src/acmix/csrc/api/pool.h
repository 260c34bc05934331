// Threads for the tasks of a call: those of the caller's OpenMP runtime where it lends them, else a
// small pool of our own.
#pragma once

#include <cstdint>

namespace acmix {

using TaskFunction = void (*)(const void* context, int64_t task, float* scratch);

// Runs tasks 0 .. tasks - 1 on at most `threads` threads, the caller's among them; each thread has
// `scratch` floats of its own, aligned to 64 bytes. False when memory for them ran out.
bool run_tasks(int64_t threads, int64_t tasks, int64_t scratch, TaskFunction function,
               const void* context);

// libgomp's entry point for a parallel region. After a parallel region the runtime's threads spin
// for some milliseconds in wait of the next one, and would keep threads of our own off the cores.
using ParallelRegion = void (*)(void (*function)(void*), void* data, unsigned threads,
                                unsigned flags);
void lend_threads(ParallelRegion region);

}  // namespace acmix
