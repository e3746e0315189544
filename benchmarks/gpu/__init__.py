"""Everything that only a GPU can tell, in one command: first whether it is right, then how fast.

    python -m benchmarks.gpu [--parts kernels,memories,step] [--output runs/gpu] [--limit 560]
                             [--rounds 5] [--tiny]

Each part is a process of its own with its own limit of seconds, and adds each row to OUTPUT/gpu.md
when it has it: a row that fails costs no other one whose model and twin there are, a part that is
killed no other part and none of its rows so far. Warnings and tracebacks are in OUTPUT/stderr.log.
Fails where a row or part did, or where an error is above its tolerance (gpu.tolerances). One GPU,
of any size; what does not fit is a row that says so. Times are medians of rounds between two
synchronisations after two that are not counted, with the rounds' spread. `--tiny` runs the same
code on toy sizes, on a CPU too: it shows that the command works, and no time of it means anything.

All but `step` needs torch and numpy alone (on a GPU triton, which torch brings). For `step` on a
machine without network, bring the wheels of what else it imports, of the versions that
constraints.txt has; PyYAML, packaging and typing-extensions too where they are missing:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -d wheels \
      pydantic==V pydantic-core==V annotated-types==V typing-inspection==V megatron-core==V
    pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site   # there

All of it takes about twenty minutes. Where a command may take ten, in this order, each with an
--output of its own: kernels,fp8,memories,ring,grouped,chain; step_8k with --rounds 3; and
step_32k,step_128k,diagonals,graphs,streaming with --rounds 3.

(--no-deps: megatron-core would bring another torch. DeepSpeed is for two ranks and more, and is not
imported.)
"""
