/* The row code is C for processors and, for GPUs, C++: what the second calls otherwise. */
#ifndef OPDC_LANGUAGE_H
#define OPDC_LANGUAGE_H

/* A value of a struct: MAKE(mass){...} */
#ifdef __cplusplus
#  define MAKE(type) type
#  define _Alignas alignas
#  define _Static_assert static_assert
#else
#  define MAKE(type) (type)
#endif

/* A function of its own. NVRTC would put a copy of it wherever it is called, and take minutes. */
#ifdef __CUDACC_RTC__
#  define OUTLINED static __noinline__
#  define OUTLINED_INLINE static __noinline__ /* what a processor may inline */
#  define OUTLINED_FOR_ALL __noinline__
#else
#  define OUTLINED static
#  define OUTLINED_INLINE static inline
#  define OUTLINED_FOR_ALL
#endif

#endif
