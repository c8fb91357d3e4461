"""
REQUIRED INPUTS   checkpoint files     {path of the model in config.yaml}/*
                  lock, if there is    locks/{model}.json
OUTPUTS           a record a file      results/source/{model}/files/{file}.json
                  the whole source     results/source/{model}/source.json
                  demo texts           results/demo/{split}/{kind}.jsonl

A file whose hash, size, tensor names or shapes are not the lock's stops the build with its name. A model from the
hub will get its files here, by one download job a file, under the same records.
"""


rule source_file:
    input:
        file=source_file,
        lock=lock_of,
        lib=modules("source_file"),
    output:
        record="results/source/{model}/files/{file}.json",
    log:
        "logs/source_file/{model}/{file}.log",
    benchmark:
        "results/benchmarks/source_file/{model}/{file}.tsv"
    conda:
        "../envs/requant.yaml"
    script:
        "../scripts/source_file.py"


rule source:
    input:
        files=checked_files,
        lock=lock_of,
        lib=modules("source"),
    output:
        record="results/source/{model}/source.json",
    log:
        "logs/source/{model}.log",
    benchmark:
        "results/benchmarks/source/{model}.tsv"
    conda:
        "../envs/requant.yaml"
    params:
        path=source_path_of,
    script:
        "../scripts/source.py"


rule lock:
    log:
        "logs/lock.log",
    conda:
        "../envs/requant.yaml"
    params:
        model=model_asked_for,
        source=path_asked_for,
    script:
        "../scripts/lock.py"


rule demo_text:
    input:
        generator=located("demo/generate.py"),
        lib=modules("demo_text"),
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
    params:
        documents=demo_documents,
    script:
        "../scripts/demo_text.py"
