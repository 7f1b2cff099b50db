/* Rows that are named by ids, anywhere in memory: their dot products with a vector, and weighted
 * sums of them.
 *
 * A sum has one order for every instruction set: of a dot product, sixteen sums side by side (one
 * of doubles) over the numbers of the row, and the tree of group_sum at its end; of a weighted sum,
 * the rows one after the other.
 */
#ifndef OPDC_GATHERED_H
#define OPDC_GATHERED_H

/* Rows that are worked on together: their sums do not wait for each other, and a number that all
 * of them need is loaded once. */
#define ABREAST GATHER_AHEAD

/* What lies at the same offset of rows that come later: rows of a few pages at random places are
 * over before the processor's own prefetching has found them. */
SPECIALISED void prefetch_rows(const char *const *later, const int abreast, int64_t offset) {
  for (int r = 0; r < abreast; r++)
    __builtin_prefetch((const void *)((uintptr_t)later[r] + (uintptr_t)offset));
}

/* The numbers in a cache line: whole groups. */
SPECIALISED int64_t line_numbers(const dtype type) { return 64 / dtype_bytes(type); }

/* A group at the end of a row of which only `count` numbers exist; the others are 0. */
SPECIALISED group load_rest(const char *from, const dtype type, int64_t count) {
  real padded_numbers[GROUP] = {0};
  group all;
  for (int64_t i = 0; i < count && i < GROUP; i++)
    padded_numbers[i] = (real)load_element(from, type, i);
  for (int part = 0; part < PARTS; part++)
    all.part[part] = lane_load(padded_numbers + part * LANES);
  return all;
}

SPECIALISED void dots_typed(const real *vector, const char *const *rows, const int abreast,
                            const dtype type, int64_t width, double *sums) {
  const int64_t line = line_numbers(type), whole = width / line * line;
  group all[ABREAST];
  for (int r = 0; r < abreast; r++) all[r] = group_of(0);
  for (int64_t start = 0; start < whole; start += line) {
    prefetch_rows(rows + GATHER_AHEAD, abreast, start * dtype_bytes(type));
    for (int64_t first = start; first < start + line; first += GROUP)
      for (int part = 0; part < PARTS; part++) {
        const int64_t i = first + part * LANES;
        const lane factor = lane_load(vector + i);
        for (int r = 0; r < abreast; r++)
          all[r].part[part] = lane_fma(factor, load_lane(element_address(rows[r], type, i), type),
                                       all[r].part[part]);
      }
  }
  for (int64_t first = whole; first < width; first += GROUP)
    for (int r = 0; r < abreast; r++) {
      const group rest = load_rest(element_address(rows[r], type, first), type, width - first);
      for (int part = 0; part < PARTS; part++)
        all[r].part[part] =
            lane_fma(lane_load(vector + first + part * LANES), rest.part[part], all[r].part[part]);
    }
  for (int r = 0; r < abreast; r++) sums[r] = (double)group_sum(all[r].part);
}

SPECIALISED void add_rows_typed(const char *const *rows, const double *factors, const int abreast,
                                const dtype type, int64_t width, real *sums) {
  const int64_t line = line_numbers(type), whole = width / line * line;
  const char *row_at[ABREAST], *later[ABREAST]; /* in registers: a store may not change them */
  lane factor[ABREAST];
  for (int r = 0; r < abreast; r++) {
    row_at[r] = rows[r];
    later[r] = rows[r + GATHER_AHEAD];
    factor[r] = lane_set((real)factors[r]);
  }
  for (int64_t start = 0; start < whole; start += line) {
    prefetch_rows(later, abreast, start * dtype_bytes(type));
    for (int64_t i = start; i < start + line; i += LANES) {
      lane sum = lane_load(sums + i);
      for (int r = 0; r < abreast; r++)
        sum = lane_fma(factor[r], load_lane(element_address(row_at[r], type, i), type), sum);
      lane_store(sums + i, sum);
    }
  }
  for (int64_t first = whole; first < width; first += GROUP)
    for (int r = 0; r < abreast; r++) {
      const group rest = load_rest(element_address(row_at[r], type, first), type, width - first);
      for (int part = 0; part < PARTS; part++) {
        real *to = sums + first + part * LANES;
        lane_store(to, lane_fma(factor[r], rest.part[part], lane_load(to)));
      }
    }
}

SPECIALISED void dots_abreast(const real *vector, const char *const *rows, const int abreast,
                              dtype type, int64_t width, double *sums) {
  switch (type) {
  case dtype_f32: dots_typed(vector, rows, abreast, dtype_f32, width, sums); break;
  case dtype_bf16: dots_typed(vector, rows, abreast, dtype_bf16, width, sums); break;
  case dtype_f16: dots_typed(vector, rows, abreast, dtype_f16, width, sums); break;
  case dtype_f64:
#if OPDC_F64
    dots_typed(vector, rows, abreast, dtype_f64, width, sums);
#endif
    break;
  }
}

SPECIALISED void add_rows_abreast(const char *const *rows, const double *factors, const int abreast,
                                  dtype type, int64_t width, real *sums) {
  switch (type) {
  case dtype_f32: add_rows_typed(rows, factors, abreast, dtype_f32, width, sums); break;
  case dtype_bf16: add_rows_typed(rows, factors, abreast, dtype_bf16, width, sums); break;
  case dtype_f16: add_rows_typed(rows, factors, abreast, dtype_f16, width, sums); break;
  case dtype_f64:
#if OPDC_F64
    add_rows_typed(rows, factors, abreast, dtype_f64, width, sums);
#endif
    break;
  }
}

static void dots(const void *vector, const char *const *rows, int64_t count, dtype type,
                 int64_t width, double *sums) {
  int64_t r = 0;
  for (; r + ABREAST <= count; r += ABREAST)
    dots_abreast(vector, rows + r, ABREAST, type, width, sums + r);
  for (; r < count; r++) dots_abreast(vector, rows + r, 1, type, width, sums + r);
}

static void add_rows(const char *const *rows, const double *factors, int64_t count, dtype type,
                     int64_t width, void *sums) {
  int64_t r = 0;
  for (; r + ABREAST <= count; r += ABREAST)
    add_rows_abreast(rows + r, factors + r, ABREAST, type, width, sums);
  for (; r < count; r++) add_rows_abreast(rows + r, factors + r, 1, type, width, sums);
}

/* A row in the arithmetic's own type, padded by 0 to whole groups. */
static void widen(const void *from, dtype type, int64_t width, void *to) {
  real *numbers = to;
  for (int64_t start = 0; start < width; start += BLOCK)
    gather(from, type, start, block_length(start, width), numbers + start);
  for (int64_t i = width; i % GROUP != 0; i++) numbers[i] = 0;
}

/* From the arithmetic's own type to that of the row: rounded once. */
static void narrow(const void *from, dtype type, int64_t width, void *to) {
  const real *numbers = from;
  for (int64_t start = 0; start < width; start += BLOCK)
    scatter(numbers + start, type, start, block_length(start, width), to);
}

#endif
