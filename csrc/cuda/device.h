/* What a GPU has that C has not: threads, what they share, and where they wait for each other. The
 * kernels know no more of it than this page; tests/cuda/device.h is the same page for a processor.
 */
#ifndef OPDC_DEVICE_H
#define OPDC_DEVICE_H

#define SHARED __shared__
#define MOST_THREADS 256
/* A kernel: a function of one argument that the host launches by its name. */
#define ENTRY(name, type, argument)                                                                \
  extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                       \
      name(const __grid_constant__ type argument)

static inline int thread_index() { return (int)threadIdx.x; }
static inline int thread_count() { return (int)blockDim.x; }
static inline int64_t group_index() { return (int64_t)blockIdx.x; } /* of the thread block, */
static inline int64_t group_count() { return (int64_t)gridDim.x; }  /* of so many */

/* The dynamic shared memory of the thread block. */
extern __shared__ __align__(64) double shared_numbers[];
static inline char *shared_memory() { return (char *)shared_numbers; }

/* All threads of the block; those of a team of LANES, which are half of a warp. */
static inline void row_sync() { __syncthreads(); }
static inline unsigned team_mask() { return 0xffffu << (threadIdx.x & 16u); }
static inline void team_sync() {
#if !OPDC_F64 /* whose teams are single threads */
  __syncwarp(team_mask());
#endif
}
static inline float shuffle_xor(float x, int apart) {
  return __shfl_xor_sync(team_mask(), x, apart, 16);
}
static inline int team_any(int flag) { return __any_sync(team_mask(), flag); }

static inline int64_t add_to_shared(int64_t *number, int64_t more) {
  return (int64_t)atomicAdd((unsigned long long *)number, (unsigned long long)more);
}

#endif
