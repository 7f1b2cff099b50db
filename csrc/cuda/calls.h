/* The public functions on a GPU, after the checks that all devices share. */
#ifndef OPDC_CUDA_CALLS_H
#define OPDC_CUDA_CALLS_H

#include "launches.h"

opdc_status gpu_loss(const plan *at, const result *to, opdc_error *error);
opdc_status gpu_gradient(const plan *at, opdc_error *error);
opdc_status gpu_scale(const scaling *at, const opdc_device *device, opdc_error *error);
opdc_status gpu_topk(const ranking *at, const opdc_device *device, opdc_error *error);
opdc_status gpu_drift(const gating *at, const opdc_device *device, opdc_error *error);

/* A step of a loss in slices; `to` of slice_settle. */
opdc_status gpu_phase(const phase *of, slice_step step, const result *to, opdc_error *error);

#endif
