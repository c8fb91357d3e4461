"""
REQUIRED INPUTS   tokens               results/calibration/{source}/{calibration}/tokens.safetensors
                  shards of the block  {path of the source}/*.safetensors
                  of a pruned model    results/{model}/prune/keep.json (or keep_{block}.json)
OUTPUTS           embeddings           results/reference/{model}/{calibration}/embedded.safetensors
                  output of a block    results/reference/{model}/{calibration}/hidden_{block}.safetensors
                  of held-out tokens   heldout_embedded.safetensors, heldout_hidden_{block}.safetensors beside either
                  expert hits          results/reference/{model}/{calibration}/routing_{block}.json
                  their saliencies     results/reference/{model}/{calibration}/saliency_{block}.csv

A model's hidden states, block by block. They depend on model and calibration and on no scheme: every release of a
model shares them. {source} is the model whose files are read: a pruned model's is the one that it is made from.
"""


rule embed:
    input:
        tokens=tokens_of,
        shards=outer_shards,
    output:
        hidden=hidden_states("results/reference/{model}/{calibration}/embedded.safetensors"),
        heldout="results/reference/{model}/{calibration}/heldout_embedded.safetensors",
    log:
        "logs/embed/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/embed/{model}/{calibration}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("embed"),
        runtime=run_time_of("embed"),
    params:
        *code_and_libraries("embed"),
        source=source_path_of,
    script:
        "../scripts/embed.py"


rule reference:
    input:
        tokens=tokens_of,
        hidden=reference_before,
        heldout=heldout_before,
        keep=keep_list,
        shards=block_shards,
    output:
        hidden=hidden_states("results/reference/{model}/{calibration}/hidden_{block}.safetensors"),
        heldout="results/reference/{model}/{calibration}/heldout_hidden_{block}.safetensors",
        routing="results/reference/{model}/{calibration}/routing_{block}.json",
        saliency="results/reference/{model}/{calibration}/saliency_{block}.csv",
    log:
        "logs/reference/{model}/{calibration}/{block}.log",
    benchmark:
        "results/benchmarks/reference/{model}/{calibration}/{block}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        gpu=gpus,
        mem_mb=memory_of("reference"),
        runtime=run_time_of("reference"),
    params:
        *code_and_libraries("reference"),
        source=source_path_of,
        device=device,
    script:
        "../scripts/reference.py"
