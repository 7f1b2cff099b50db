/* Compiled programs on disk. A file is the data and, after it, their hash: one that was cut off or
 * changed is as good as none. */
#define _DEFAULT_SOURCE /* mkstemp */
#include "cache.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

uint64_t hash_more(uint64_t hash, const void *data, size_t bytes) {
  const unsigned char *const at = data;
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ at[i]) * 0x100000001b3u;
  return hash;
}

/* The path of a file; 0 if there is no place for it. */
static int path_of(const char *name, char path[PATH_MAX]) {
  const char *const own = getenv("OPDC_CACHE"), *const user = getenv("XDG_CACHE_HOME"),
                    *const home = getenv("HOME");
  int length = 0;
  if (own && *own)
    length = snprintf(path, PATH_MAX, "%s/%s", own, name);
  else if (user && *user == '/') /* a relative one is to be ignored, says its specification */
    length = snprintf(path, PATH_MAX, "%s/opdc/%s", user, name);
  else if (home && *home)
    length = snprintf(path, PATH_MAX, "%s/.cache/opdc/%s", home, name);
  return length > 0 && length < PATH_MAX;
}

static void make_folders_of(char *path) {
  for (char *at = path + 1; (at = strchr(at, '/')) != NULL; at++) {
    *at = 0;
    (void)mkdir(path, 0777); /* if it cannot be made, the file cannot either */
    *at = '/';
  }
}

char *cache_read(const char *name, size_t *bytes) {
  char path[PATH_MAX];
  FILE *const file = path_of(name, path) ? fopen(path, "rb") : NULL;
  if (!file) return NULL;
  struct stat about;
  uint64_t hash;
  size_t size = 0;
  char *data = NULL;
  if (fstat(fileno(file), &about) == 0 && about.st_size > (off_t)sizeof hash) {
    size = (size_t)about.st_size - sizeof hash;
    data = malloc(size + 1);
  }
  const int whole = data && fread(data, 1, size, file) == size &&
                    fread(&hash, sizeof hash, 1, file) == 1 &&
                    hash == hash_more(HASH_OF_NOTHING, data, size);
  fclose(file);
  if (!whole) {
    free(data);
    return NULL;
  }
  data[size] = 0;
  *bytes = size;
  return data;
}

/* Under another name first: a process that reads meanwhile sees the whole file or none. */
void cache_write(const char *name, const char *data, size_t bytes) {
  char path[PATH_MAX], fresh[PATH_MAX];
  if (!path_of(name, path)) return;
  const int length = snprintf(fresh, sizeof fresh, "%s.XXXXXX", path);
  if (length < 0 || length >= (int)sizeof fresh) return;
  make_folders_of(path);
  const int descriptor = mkstemp(fresh);
  if (descriptor < 0) return;
  FILE *const file = fdopen(descriptor, "wb");
  if (!file) {
    close(descriptor);
    unlink(fresh);
    return;
  }
  const uint64_t hash = hash_more(HASH_OF_NOTHING, data, bytes);
  const int whole =
      fwrite(data, 1, bytes, file) == bytes && fwrite(&hash, sizeof hash, 1, file) == 1;
  if (fclose(file) != 0 || !whole || rename(fresh, path) != 0) unlink(fresh);
}
