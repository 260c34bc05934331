"""Stage II of ACmix in one operator: attention and convolution of the same pieces, mixed.

For the layer, and by the CPU kernel alone so far. Done apart, the two paths leave two maps to be
added, and autograd joins the gradients of q, k, v and of the convolution's pieces in copies of the
size of all of them. The channels of attention are head-major and those of the convolution d-major;
they are added as they are.
"""
