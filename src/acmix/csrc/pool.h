// A small pool of threads of our own.
#pragma once

#include <cstdint>

namespace acmix {

using TaskFunction = void (*)(const void* context, int64_t task, float* scratch);

// Runs tasks 0 .. tasks - 1 on at most `threads` threads, the caller's among them; each thread has
// `scratch` floats of its own, aligned to 64 bytes. False when memory for them ran out.
bool run_tasks(int64_t threads, int64_t tasks, int64_t scratch, TaskFunction function,
               const void* context);

}  // namespace acmix
