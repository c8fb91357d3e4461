"""
REQUIRED INPUTS   the checkpoint       results/{release}/model/*, by its manifest results/{release}/pack.json
                  that it is served    results/{release}/deploy.json
                  source               {path of the source}/*, by its record results/source/{model}/source.json
                  tasks                files under the benchmark's include_path, and the data files they name; or the
                                       files of a benchmark as published, under its `data`
OUTPUTS           source scores        results/reference/{model}/served_benchmarks/{target}/{benchmark}/{task}.json
                  release scores       results/{release}/served_benchmarks/{task}.measured.json
                  their rows           {task}.samples.jsonl beside either
                  what they mean       results/{release}/served_benchmarks/{task}.json: the score, beside the expected
                                       range and the source's
MEANWHILE         what is served       .{task}.served/ beside the scores: gone when the job ends
                  answers so far       .{task}*.answers.jsonl beside the scores: what a killed job goes on with

{model} is the checkpoint that releases are made from, before any pruning.
"""


rule measure_served_source:
    input:
        record="results/source/{model}/source.json",
        source=all_shards,
        tokenizer=tokenizer_files,
        tasks=served_task_files,
    output:
        record="results/reference/{model}/served_benchmarks/{target}/{benchmark}/{task}.json",
        samples="results/reference/{model}/served_benchmarks/{target}/{benchmark}/{task}.samples.jsonl",
    log:
        job="logs/measure_served_source/{model}/{target}/{benchmark}/{task}.log",
        engine="logs/measure_served_source/{model}/{target}/{benchmark}/{task}.engine.log",
    benchmark:
        "results/benchmarks/measure_served_source/{model}/{target}/{benchmark}/{task}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=serving_gpus,
        mem_mb=memory_of("measure_served_source"),
        runtime=run_time_of("measure_served_source"),
    params:
        *code_and_libraries("measure_served_source"),
        source=source_path_of,
        settings=served_config,
        target=target_config,
        tasks=benchmark_folder,
        data=served_data,
        sandbox=sandbox_config,
    script:
        "../scripts/measure_served_source.py"


rule measure_served:
    input:
        packed=packed_files,
        deploy="results/{release}/deploy.json",
        tasks=served_task_files,
    output:
        record="results/{release}/served_benchmarks/{task}.measured.json",
        samples="results/{release}/served_benchmarks/{task}.samples.jsonl",
    log:
        job="logs/measure_served/{release}/{task}.log",
        engine="logs/measure_served/{release}/{task}.engine.log",
    benchmark:
        "results/benchmarks/measure_served/{release}/{task}.tsv"
    conda:
        "../envs/requant.yaml"
    threads: 1
    resources:
        gpu=serving_gpus,
        mem_mb=memory_of("measure_served"),
        runtime=run_time_of("measure_served"),
    params:
        *code_and_libraries("measure_served"),
        benchmark=benchmark_of,
        target_name=serving_target,
        settings=served_config,
        target=target_config,
        tasks=benchmark_folder,
        data=served_data,
        sandbox=sandbox_config,
    script:
        "../scripts/measure_served.py"


rule served_benchmark:
    input:
        measured="results/{release}/served_benchmarks/{task}.measured.json",
        samples="results/{release}/served_benchmarks/{task}.samples.jsonl",
        source=served_source,
    output:
        record="results/{release}/served_benchmarks/{task}.json",
    log:
        "logs/served_benchmark/{release}/{task}.log",
    benchmark:
        "results/benchmarks/served_benchmark/{release}/{task}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("served_benchmark"),
        runtime=run_time_of("served_benchmark"),
    params:
        *code_and_libraries("served_benchmark"),
        source_model=served_source_model,
        settings=served_comparison_config,
    script:
        "../scripts/served_benchmark.py"
