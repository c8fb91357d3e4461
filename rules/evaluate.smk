"""
REQUIRED INPUTS   the checkpoint       results/{release}/model/*, by its manifest results/{release}/pack.json
                  held-out tokens      results/calibration/{source}/{calibration}/tokens.safetensors
                  reference chain      results/reference/{model}/{calibration}/heldout_*.safetensors
                  source               {path of the model}/*.safetensors
                  of a pruned model    its keep list, and the end of its source's reference chain
OUTPUTS           KL, perplexity, ...  results/{release}/evaluate.json
"""


rule evaluate:
    input:
        packed=packed_files,
        tokens=tokens_of,
        calibration=calibration_record,
        hidden=heldout_chain,
        keep=keep_list,
        original=end_of_original,
        source=all_shards,
    output:
        record="results/{release}/evaluate.json",
    log:
        "logs/evaluate/{release}.log",
    benchmark:
        "results/benchmarks/evaluate/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=memory_of("evaluate"),
        runtime=run_time_of("evaluate"),
    params:
        *code_and_libraries("evaluate"),
        source=source_path_of,
        model=model_of,
        device=device,
    script:
        "../scripts/evaluate.py"
