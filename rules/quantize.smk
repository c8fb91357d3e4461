"""
Blocks of a release whose scheme quantizes:

REQUIRED INPUTS   tokens               results/calibration/{source}/{calibration}/tokens.safetensors
                  reference outputs    results/reference/{model}/{calibration}/hidden_{block}.safetensors
                  tuning inputs        results/{release}/chain/{block - 1}.safetensors (or the reference chain's)
                  shards of the block  {path of the source}/*.safetensors
                  of a pruned model    results/{model}/prune/keep.json (or keep_{block}.json)
OUTPUTS           packed tensors       results/{release}/blocks/{block}.safetensors
                  losses, hits, ...    results/{release}/blocks/{block}.json
                  output as shipped    results/{release}/chain/{block}.safetensors

With `inputs: reference` blocks wait for the reference chain alone, and none has an output for the next one:
`quantize_apart`.

Blocks of a release in BF16:

REQUIRED INPUTS   shards of the block  {path of the source}/*.safetensors
                  of a pruned model    results/{model}/prune/keep.json (or keep_{block}.json)
OUTPUTS           the source's tensors results/{release}/blocks/{block}.safetensors
                  what was copied      results/{release}/blocks/{block}.json
"""


rule quantize:
    input:
        tokens=tokens_of,
        hidden=tuning_inputs,
        targets=reference_after,
        keep=keep_list,
        shards=block_shards,
    output:
        block="results/{release}/blocks/{block}.safetensors",
        record="results/{release}/blocks/{block}.json",
        hidden=hidden_states("results/{release}/chain/{block}.safetensors"),
    log:
        "logs/quantize/{release}/{block}.log",
    benchmark:
        "results/benchmarks/quantize/{release}/{block}.tsv"
    wildcard_constraints:
        release=made_by("quantize"),
    priority: tuners_first
    conda:
        "../envs/requant.yaml"
    threads: tuning_threads
    resources:
        gpu=tuning_gpus,
        mem_mb=memory_of("quantize"),
        runtime=run_time_of("quantize"),
    params:
        *code_and_libraries("quantize"),
        source=source_path_of,
        model=model_of,
        scheme=scheme_of_release,
        tuning=tuning_config,
        keep=keep_patterns,
    script:
        "../scripts/quantize.py"


use rule quantize as quantize_apart with:
    output:
        block="results/{release}/blocks/{block}.safetensors",
        record="results/{release}/blocks/{block}.json",
    wildcard_constraints:
        release=made_by("quantize_apart"),


rule copy_block:
    input:
        keep=keep_list,
        shards=shards_to_copy,
    output:
        block="results/{release}/blocks/{block}.safetensors",
        record="results/{release}/blocks/{block}.json",
    log:
        "logs/copy_block/{release}/{block}.log",
    benchmark:
        "results/benchmarks/copy_block/{release}/{block}.tsv"
    wildcard_constraints:
        release=made_by("copy_block"),
    priority: tuners_first
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("copy_block"),
        runtime=run_time_of("copy_block"),
    params:
        *code_and_libraries("copy_block"),
        source=source_path_of,
        scheme=scheme_of_release,
    script:
        "../scripts/copy_block.py"
