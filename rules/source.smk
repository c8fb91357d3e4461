"""
REQUIRED INPUTS   checkpoint files     {path of the model in config.yaml}/*, a repository of the hub at a commit, or
                                       a prefix of a bucket
                  lock, if there is    locks/{model}.json; a model from the hub or a bucket has one
OUTPUTS           a record a file      results/source/{model}/files/{file}.json
                  files fetched        results/source/{model}/checkpoint/{file}: links into the hub's cache or a directory
                  the whole source     results/source/{model}/source.json
                  demo texts           results/demo/{split}/{kind}.jsonl

A file whose hash, size, tensor names or shapes are not the lock's stops the build with its name. A model from the
hub or a bucket gets its files by one download job a file; each is checked before it is linked here, so that a block
can be worked on as soon as the shards that hold it have come.
"""


ruleorder: download > source_file


rule download:
    input:
        lock=lock_to_download,
    output:
        file="results/source/{model}/checkpoint/{file}",
        record="results/source/{model}/files/{file}.json",
    log:
        "logs/download/{model}/{file}.log",
    benchmark:
        "results/benchmarks/download/{model}/{file}.tsv"
    wildcard_constraints:
        model=remote_models(),
    conda:
        "../envs/requant.yaml"
    resources:
        downloads=1,
        mem_mb=memory_of("download"),
        runtime=run_time_of("download"),
    params:
        *code_and_libraries("download"),
        repository=repository_of,
    script:
        "../scripts/download.py"


rule source_file:
    input:
        file=source_file,
        lock=lock_of,
    output:
        record="results/source/{model}/files/{file}.json",
    log:
        "logs/source_file/{model}/{file}.log",
    benchmark:
        "results/benchmarks/source_file/{model}/{file}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("source_file"),
        runtime=run_time_of("source_file"),
    params:
        *code_and_libraries("source_file"),
    script:
        "../scripts/source_file.py"


rule source:
    input:
        files=checked_files,
        config=source_config,
        lock=lock_of,
    output:
        record="results/source/{model}/source.json",
    log:
        "logs/source/{model}.log",
    benchmark:
        "results/benchmarks/source/{model}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("source"),
        runtime=run_time_of("source"),
    params:
        *code_and_libraries("source"),
        path=source_path_of,
    script:
        "../scripts/source.py"


localrules:
    lock,


rule lock:
    log:
        "logs/lock.log",
    conda:
        "../envs/requant.yaml"
    params:
        model=model_asked_for,
        source=source_asked_for,
    script:
        "../scripts/lock.py"


rule demo_text:
    input:
        generator=located("demo/generate.py"),
    output:
        text="results/demo/{split}/{kind}.jsonl",
    log:
        "logs/demo_text/{split}-{kind}.log",
    benchmark:
        "results/benchmarks/demo_text/{split}-{kind}.tsv"
    wildcard_constraints:
        split="calibration|test",
        kind="stories|exercises",
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("demo_text"),
        runtime=run_time_of("demo_text"),
    params:
        *code_and_libraries("demo_text"),
        documents=demo_documents,
    script:
        "../scripts/demo_text.py"
