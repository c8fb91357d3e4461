"""
REQUIRED INPUTS   texts                the `path`s of the calibration's sources
                  tokenizer            {path of the model}/tokenizer.json, ...
OUTPUTS           tokens, masks        results/calibration/{model}/{calibration}/tokens.safetensors
                  counts and hashes    results/calibration/{model}/{calibration}/calibration.json
"""


rule calibrate:
    input:
        texts=calibration_texts,
        tokenizer=tokenizer_files,
    output:
        tokens="results/calibration/{model}/{calibration}/tokens.safetensors",
        record="results/calibration/{model}/{calibration}/calibration.json",
    log:
        "logs/calibrate/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/calibrate/{model}/{calibration}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("calibrate"),
        runtime=run_time_of("calibrate"),
    params:
        *code_and_libraries("calibrate"),
        source=source_path_of,
        calibration=calibration_config,
    script:
        "../scripts/calibrate.py"
