/* Rows whose vocabulary is cut into slices, one a process: what each says, and the row that they
 * make together, by the formulas that combine the blocks of a row. */
#ifndef OPDC_SLICES_H
#define OPDC_SLICES_H

static const mass no_mass = {-INFINITY, -1, 0, NAN};

OUTLINED mass mass_of_slice(const row_call *call, mass of) {
  of.index += (double)call->first;
  return of;
}

OUTLINED void describe_masses(const row_call *call, const row *from, slice_part *out) {
  out->student = mass_of_slice(call, from->student);
  out->teacher = mass_of_slice(call, from->teacher);
  out->log_ratio = from->log_ratio;
  out->reverse_kl = from->reverse_kl;
  out->forward_kl = from->forward_kl;
}

OUTLINED void list_candidates(const row_call *call, const row_input *input, const candidate *found,
                              int64_t count, int64_t room, part_entry *to) {
  FOR_EACH_OF_ROW(i, (int64_t)0, room) {
    to[i] = MAKE(part_entry){-1, NAN, NAN};
    if (i >= count) continue;
    to[i].id = (double)(found[i].id + call->first);
    to[i].student = load_element(input->student, call->student_type, found[i].id);
    if (input->teacher)
      to[i].teacher = load_element(input->teacher, call->teacher_type, found[i].id);
  }
  row_sync(); /* the candidates may be others from here on */
}

/* Of the ids of the slice the k that may be in the support; 1 if they cannot be ranked. */
OUTLINED int list_support(const row_call *call, const row_input *input, workspace *work,
                          part_entry *to) {
  dtype type;
  const void *ranking = ranking_row(call, input, &type);
  candidate *found = NULL;
  int64_t count = 0;
  if (call->vocabulary > 0) {
    const int measured = call->support == OPDC_STUDENT ? call->student_mass : call->teacher_mass;
    if (!measured && !read_tiles(ranking, type, call->vocabulary, work->candidates)) return 1;
    count = largest(ranking, type, call->vocabulary, call->k, work->candidates, &found);
    if (work->candidates[0].value == INFINITY) return 1;
  }
  list_candidates(call, input, found, count, call->k, to);
  return 0;
}

/* The student's logits of the slots of a sparse teacher. */
OUTLINED void list_slots(const row_call *call, const row_input *input, part_entry *to) {
  FOR_EACH_OF_ROW(slot, (int64_t)0, call->k) {
    const int64_t id = load_id(input->slot_ids, call->slot_bytes, slot) - call->first;
    to[slot] = MAKE(part_entry){-1, NAN, NAN};
    if (id < 0 || id >= call->vocabulary) continue;
    to[slot].id = (double)(id + call->first);
    to[slot].student = load_element(input->student, call->student_type, id);
  }
}

OUTLINED void list_students(const row_call *call, const row_input *input, workspace *work,
                            part_entry *to) {
  candidate *found = NULL;
  int64_t count = 0;
  if (call->vocabulary > 0 &&
      read_tiles(input->student, call->student_type, call->vocabulary, work->candidates))
    count = largest(input->student, call->student_type, call->vocabulary,
                    call->k + 1 < call->vocabulary ? call->k + 1 : call->vocabulary,
                    work->candidates, &found);
  list_candidates(call, input, found, count, call->k + 1, to);
}

OUTLINED void measure_slice(const row_call *call, const row_input *input, slice_part *out,
                            workspace *work) {
  part_entry *entries = entries_after(out);
  row at = {0};
  begin_row(input, &at);
  at.student = no_mass;
  if (input->teacher) at.teacher = no_mass;
  if (call->student_mass && call->vocabulary > 0) measure_masses(call, input, &at, work);
  describe_masses(call, &at, out);
  out->teacher_at_top =
      input->teacher && keeps_derivatives(call) && 1 + at.student.rest > 0
          ? load_element(input->teacher, call->teacher_type, (int64_t)at.student.index)
          : (double)NAN;
  out->token_student = out->token_teacher = NAN;
  if (input->token >= 0) {
    out->token_student = token_logit(input->student, call->student_type, input->token);
    out->token_teacher = token_logit(input->teacher, call->teacher_type, input->token);
  }
  out->unranked = 0;
  if (!has_support(call) || input->prefix) return;
  if (input->slot_ids)
    list_slots(call, input, entries);
  else
    out->unranked = list_support(call, input, work, entries);
  if (call->overlap) list_students(call, input, work, entries + call->k);
}

/* --- All slices together ---------------------------------------------------------------------- */

OUTLINED void combine_masses_of(const row_call *call, const row_input *input, const slice_set *all,
                                row *out) {
  const temperature T = temperature_of(call);
  ROW_SHARED(batch, parts);
  int count = 0; /* of the batch */
  int64_t next = 0;
  do { /* there is at least one */
    const slice_part *of = part_of(all, next);
    parts->student[count] = of->student;
    parts->teacher[count] = input->teacher ? of->teacher : no_mass;
    parts->divergence[count++] = MAKE(kl_result){of->log_ratio, of->reverse_kl, of->forward_kl, 0};
    if (count < BATCH && next + 1 < all->count) continue;
    BY_ONE_TEAM combine_batch(parts, count, T);
    count = 1;
  } while (++next < all->count);
  const mass student = parts->student[0], teacher = parts->teacher[0];
  const kl_result divergence = parts->divergence[0];
  row_sync();
  out->student = student;
  if (!input->teacher || !call->teacher_mass) return;
  out->teacher = teacher;
  out->log_ratio = divergence.log_ratio;
  out->reverse_kl = divergence.reverse_kl;
  out->forward_kl = divergence.forward_kl;
}

/* A number that one slice knows, and the others have as NaN. */
#define KNOWN(name)                                                                                \
  static double known_##name(const slice_set *all) {                                               \
    for (int64_t i = 0; i < all->count; i++)                                                       \
      if (part_of(all, i)->name == part_of(all, i)->name) return part_of(all, i)->name;            \
    return NAN;                                                                                    \
  }
KNOWN(token_student)
KNOWN(token_teacher)
#undef KNOWN

OUTLINED double teacher_at_top_of(const slice_set *all, const row *out) {
  for (int64_t i = 0; i < all->count; i++)
    if (part_of(all, i)->student.index == out->student.index)
      return part_of(all, i)->teacher_at_top;
  return NAN;
}

/* Larger logits first, of equal ones the lower id. */
OUTLINED int by_student(const void *a, const void *b) {
  const double left = ((const support_entry *)a)->student,
               right = ((const support_entry *)b)->student;
  return left != right ? (left < right) - (left > right) : by_id(a, b);
}
OUTLINED int by_teacher(const void *a, const void *b) {
  const double left = ((const support_entry *)a)->teacher,
               right = ((const support_entry *)b)->teacher;
  return left != right ? (left < right) - (left > right) : by_id(a, b);
}

/* What the slices list from the place `from` on, up to `room` ids each, into work->gathered. */
OUTLINED void gather_entries(const row_call *call, const slice_set *all, int64_t from, int64_t room,
                             workspace *work) {
  work->gathered_count = 0;
  for (int64_t i = 0; i < all->count; i++) {
    const part_entry *of = entries_after(part_of(all, i)) + from;
    for (int64_t j = 0; j < room; j++)
      if (of[j].id >= 0 && of[j].id < (double)call->vocabulary)
        work->gathered[work->gathered_count++] = MAKE(support_entry){
            .id = (int64_t)of[j].id, .student = of[j].student, .teacher = of[j].teacher};
  }
}

OUTLINED int64_t choose_from_slices(const row_call *call, const row_input *input,
                                    const slice_set *all, workspace *work) {
  support_entry *to = work->entries;
  int64_t count;
  for (int64_t i = 0; i < all->count; i++)
    if (part_of(all, i)->unranked != 0) return -1;
  gather_entries(call, all, 0, call->k, work);
  if (input->slot_ids) {
    BY_ONE qsort(work->gathered, (size_t)work->gathered_count, sizeof *to, by_id);
    count = choose_slots(call, input, to);
    for (int64_t i = 0; i < count; i++) {
      const support_entry *known = (const support_entry *)bsearch(
          &to[i], work->gathered, (size_t)work->gathered_count, sizeof *to, by_id);
      to[i].student = known ? known->student : known_token_student(all);
    }
  } else {
    count = work->gathered_count < call->k ? work->gathered_count : call->k;
    BY_ONE qsort(work->gathered, (size_t)work->gathered_count, sizeof *to,
                 call->support == OPDC_STUDENT ? by_student : by_teacher);
    memcpy(to, work->gathered, (size_t)count * sizeof *to);
    if (count == 0) return -1; /* nothing but -inf */
    if (call->support == OPDC_TEACHER_TOKEN && !has_id(to, count, input->token) &&
        known_token_teacher(all) != -INFINITY)
      to[count++] = MAKE(support_entry){.id = input->token,
                                        .student = known_token_student(all),
                                        .teacher = known_token_teacher(all)};
  }
  BY_ONE qsort(to, (size_t)count, sizeof *to, by_id);
  return count;
}

OUTLINED double overlap_of_slices(const row_call *call, const slice_set *all, const row *of,
                                  workspace *work) {
  int64_t common = 0;
  if (work->count == 0) return 0;
  if (of->student.rest != of->student.rest) return NAN;
  gather_entries(call, all, call->k, call->k + 1, work);
  BY_ONE qsort(work->gathered, (size_t)work->gathered_count, sizeof *work->gathered, by_student);
  for (int64_t i = 0; i < work->count && i < work->gathered_count; i++)
    common += bsearch(&work->gathered[i], work->entries, (size_t)work->count, sizeof *work->entries,
                      by_id) != NULL;
  return (double)common;
}

OUTLINED void combine(const row_call *call, const row_input *input, const slice_set *all, row *out,
                      workspace *work) {
  begin_row(input, out);
  if (call->student_mass) {
    combine_masses_of(call, input, all, out);
    judge_masses(call, input, out);
    out->teacher_at_top = teacher_at_top_of(all, out);
  }
  if (input->token >= 0 && call->student_mass)
    measure_token(call, input, known_token_student(all), known_token_teacher(all), out);
  KERNEL(describe)(call, input, out);
  work->count = 0;
  if (!has_support(call) || input->prefix) return;
  work->count = has_no_support(call, input, out) ? -1 : choose_from_slices(call, input, all, work);
  weigh_support(call, input, out, work);
  if (work->count < 0) return;
  if (call->overlap) out->overlap = overlap_of_slices(call, all, out, work);
  if (!looks_again(call)) finish_support(call, no_tail, out, work);
}

/* --- The second time -------------------------------------------------------------------------- */

OUTLINED int is_worth_a_second_look(const row_call *call, const row_input *input, const row *of) {
  return has_support(call) ? !input->prefix && of->slots == of->slots : has_mixture(call, of);
}

OUTLINED void measure_again(const row_call *call, const row_input *input, const row *from,
                            slice_part *out, workspace *work) {
  row outside = {.student = no_mass, .teacher = no_mass};
  memset(out, 0, sizeof *out);
  if (!is_worth_a_second_look(call, input, from)) return;
  if (has_support(call)) {
    if (call->vocabulary > 0) outside = measure_outside(call, input, work);
    describe_masses(call, &outside, out);
  } else if (call->vocabulary > 0) {
    const mixture_sums sums = sum_mixture(call, input, from, NULL);
    memcpy(out, &sums, sizeof sums);
  }
}

OUTLINED void combine_again(const row_call *call, const row_input *input, const slice_set *all,
                            row *out, workspace *work) {
  if (!is_worth_a_second_look(call, input, out)) return;
  if (has_support(call)) {
    row outside = {0};
    combine_masses_of(call, input, all, &outside);
    finish_support(call, tail_of(call, input, out, outside), out, work);
  } else {
    mixture_sums total = {0, 0, 0, 0}, sums;
    for (int64_t i = 0; i < all->count; i++) {
      memcpy(&sums, part_of(all, i), sizeof sums);
      total.value += sums.value;
      total.others += sums.others;
      total.top += sums.top;
      total.excess += sums.excess;
    }
    finish_mixture(call, total, out);
  }
}

/* What the gradient of a slice needs; its entries are there. */
OUTLINED void keep_slice(const row_call *call, const row_input *input, const row *from,
                         workspace *work) {
  if (call->vocabulary == 0 || !is_finite(from->loss) || !work->kept) return;
  if (keeps_derivatives(call))
    (void)sum_mixture(call, input, from, work->kept);
  else
    (void)measure_one(call, input->student, call->student_type, MAKE(besides){.kept = work->kept});
}

#endif
