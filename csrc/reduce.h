/* Where the results of a call go. */
#ifndef OPDC_REDUCE_H
#define OPDC_REDUCE_H

#include "call.h"
#include "settle.h"

/* Room for the entropies of a loss that selects its positions; NULL where none does. */
opdc_status reserve_entropies(const plan *at, candidate **entropies, opdc_error *error);

opdc_status check_result(const plan *at, const DLTensor *value, const DLTensor *metrics,
                         result *out, opdc_error *error);

#endif
