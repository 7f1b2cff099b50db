/* Functions of a library that is opened by its name. */
#ifndef OPDC_CUDA_LOADER_H
#define OPDC_CUDA_LOADER_H

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

typedef struct library_function {
  const char *name;
  size_t place; /* of its pointer in a table */
} library_function;

/* The table of a list of X(what it returns, name, arguments). */
#define LIBRARY_POINTER(type, name, arguments) type(*name) arguments;
#define LIBRARY_TABLE(functions)                                                                   \
  typedef struct functions##_table {                                                               \
    functions(LIBRARY_POINTER)                                                                     \
  } functions##_table

/* Fills the table. The name of the first function that the library lacks; NULL: none. */
static inline const char *load_functions(void *library, const library_function *list, int count,
                                         void *table) {
  for (int i = 0; i < count; i++) {
    void *const address = dlsym(library, list[i].name);
    if (!address) return list[i].name;
    memcpy((char *)table + list[i].place, &address, sizeof address);
  }
  return NULL;
}

#endif
