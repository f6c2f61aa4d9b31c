// CUDA's errors as exceptions of one line.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace normwear::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("CUDA ") + what + ": " + cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace normwear::cuda
