"""
REQUIRED INPUTS   the checkpoint       results/{release}/model/*, by its manifest results/{release}/pack.json
                  the load test        results/{release}/load_test.json, where the release has one
                  its evaluation       results/{release}/evaluate.json: log-probabilities of the reference text
                  held-out tokens      results/calibration/{source}/{calibration}/tokens.safetensors
                  source               {path of the model}/*.safetensors
                  of a pruned model    results/{model}/prune/keep.json
OUTPUTS           what was served      results/{release}/deploy.json: command, answers, and whose tokens they are
                  how fast             results/{release}/throughput.json
IF A CHECK FAILS  all verdicts         results/{release}/deploy.failed.json, and no output
MEANWHILE         decoded weights      results/{release}/served/: gone when the job ends, emptied when it starts
"""


rule deploy:
    input:
        packed=files_to_serve,
        loaded=load_test_record,
        evaluated="results/{release}/evaluate.json",
        keep=keep_list,
        source=all_shards,
        tokens=tokens_of,
    output:
        record="results/{release}/deploy.json",
        throughput="results/{release}/throughput.json",
    log:
        job="logs/deploy/{release}.log",
        engine="logs/deploy/{release}.engine.log",
    benchmark:
        "results/benchmarks/deploy/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=serving_gpus,
        mem_mb=memory_of("deploy"),
        runtime=run_time_of("deploy"),
    params:
        *code_and_libraries("deploy"),
        source=source_path_of,
        settings=deploy_config,
        target=target_config,
    script:
        "../scripts/deploy.py"
