/* Compiled programs on disk, for all processes of a user. Nothing here fails: what cannot be read
 * is compiled again, and what cannot be written is not there the next time. */
#ifndef OPDC_CUDA_CACHE_H
#define OPDC_CUDA_CACHE_H

#include <stddef.h>
#include <stdint.h>

/* FNV-1a, of one thing after the other. */
#define HASH_OF_NOTHING 0xcbf29ce484222325u
uint64_t hash_more(uint64_t hash, const void *data, size_t bytes);

/* What is kept under a name, malloc'ed and with a 0 after it; NULL if there is nothing. */
char *cache_read(const char *name, size_t *bytes);
void cache_write(const char *name, const char *data, size_t bytes);

#endif
