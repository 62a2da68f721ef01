# shellcheck shell=bash disable=SC2034
# What the scripts of this folder need to know. Copy it, fill it in, and name it: --settings=FILE.

PROJECT=YOUR_PROJECT
ZONE=us-central2-b

NAME=muse-base-3b          # of the queued resource; its slice has the same name
ACCELERATOR_TYPE=v4-512    # v4-N and v5p-N count cores (two a chip), v5litepod-N and v6e-N count chips
SLICES=1                   # more than one are joined over the data-centre network
CAPACITY=spot              # on-demand, spot, or reserved
RUNTIME_VERSION=           # empty: the usual one of the accelerator

CONFIG=configs/base_3b.py
WORKDIR=gs://YOUR_BUCKET/runs/base_3b   # a run goes on from its checkpoints here, on whatever slice it wakes up
DATA_BUCKET=YOUR_BUCKET    # its name alone: read at /mnt/muse_data, where data are read as files; empty: none
# More flags of muse_jax.train. Those below say where third_party/README.md has put the weights and muse_jax.convert the
# data; configs/base_3b.py by itself looks for all of them in the folder that it is started in.
TRAIN_ARGS=(
  --config.model.text.weights=gs://YOUR_BUCKET/weights/t5_xxl
  --config.data.vocabulary=gs://YOUR_BUCKET/weights/t5/spiece.model
  --config.task.tokenizer=gs://YOUR_BUCKET/runs/vqgan_f16_256 # the workdir of the VQGAN's run
  --config.data.name=array_record
  --config.data.path=/mnt/muse_data/pairs # gs://YOUR_BUCKET/pairs
)

PYTHON_VERSION=3.12
CREATE_ARGS=()             # more flags of `gcloud compute tpus queued-resources create`, such as (--network=mine)
SSH_ARGS=()                # more flags of ssh and scp, such as (--tunnel-through-iap)

POLL_SECONDS=60            # how often watch.sh looks
MAX_CRASHES=5              # after so many crashes in a row watch.sh gives up; preemptions are not counted
MAX_UNREACHABLE=30         # so often in a row may workers not answer, or gcloud not tell, before watch.sh gives up
