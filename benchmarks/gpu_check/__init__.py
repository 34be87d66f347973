"""`make gpu-check`: whether stu is right and fast on the GPU at hand, in one file of figures."""
