# shellcheck shell=bash
# Makes training on a CPU faster. demo.sh, slurm.sbatch and tpu_worker.sh source this file. Source
# it yourself before you run `mister-jax train` on a CPU. A training step allocates and frees
# gigabytes. By default, glibc returns freed blocks to the kernel, which must clear every page again
# in the next step. With these settings, glibc keeps freed blocks and uses huge pages: a step of the
# released model takes 1.72 s instead of 2.03 s (2 cores, 8 dialogues of 64 utterances).
if [ -z "${GLIBC_TUNABLES:-}" ]; then
  GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
  GLIBC_TUNABLES+=":glibc.malloc.mmap_threshold=34359738368"
  GLIBC_TUNABLES+=":glibc.malloc.trim_threshold=68719476736"
  export GLIBC_TUNABLES
fi
