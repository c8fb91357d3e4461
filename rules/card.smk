"""
REQUIRED INPUTS   records of a release    results/{release}/{pack,verify,evaluate,deploy,benchmark}.json,
                                          results/{release}/blocks/{block}.json
                  records it shares       results/source/{model}/source.json,
                                          results/calibration/{model}/{calibration}/calibration.json,
                                          results/reference/{model}/{calibration}/routing_{block}.json,
                                          results/reference/{model}/benchmark/{benchmark}.json
                  of a pruned model       results/{model}/prune/{keep,evaluate}.json, and those of the models that
                                          it is held against; its tables of saliencies
                  its provenance          results/{release}/model/provenance.json
                  what ends a release     results/{release}/model/{SHA256SUMS,model.sig}: asked for, not read
OUTPUTS           card of a release       results/{release}/model/README.md
                  its pictures            results/{release}/model/{loss,hidden_states}.png (if it is quantized),
                                          saliency.png (if its model is pruned)
                  card of the build       model_card.md
                  its pictures            results/card/{loss,hidden_states,experts}.png (experts: if a model has any;
                                          the others: if a release is quantized)

The cards read records only: no tensor is opened here.
"""


rule plot_release:
    input:
        blocks=block_records,
        evaluate="results/{release}/evaluate.json",
    output:
        loss=report(
            "results/{release}/model/loss.png",
            caption="../report/loss.rst",
            category="Releases",
            subcategory="{release}",
            labels={"figure": "loss by depth"},
        ),
        hidden_states=report(
            "results/{release}/model/hidden_states.png",
            caption="../report/hidden_states.rst",
            category="Releases",
            subcategory="{release}",
            labels={"figure": "error of the hidden states"},
        ),
    log:
        "logs/plot_release/{release}.log",
    benchmark:
        "results/benchmarks/plot_release/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("plot_release"),
        runtime=run_time_of("plot_release"),
    params:
        *code_and_libraries("plot_release"),
    script:
        "../scripts/plot_release.py"


rule plot_saliency:
    input:
        keep=keep_list_of,
        tables=tables_of,
    output:
        saliency=report(
            "results/{release}/model/saliency.png",
            caption="../report/saliency.rst",
            category="Releases",
            subcategory="{release}",
            labels={"figure": "saliency of the experts"},
        ),
    log:
        "logs/plot_saliency/{release}.log",
    benchmark:
        "results/benchmarks/plot_saliency/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("plot_saliency"),
        runtime=run_time_of("plot_saliency"),
    params:
        *code_and_libraries("plot_saliency"),
    script:
        "../scripts/plot_saliency.py"


rule release_card:
    input:
        records=release_records,
        provenance="results/{release}/model/provenance.json",
        pictures=release_pictures,
        saliency=saliency_picture,
    output:
        readme=report(
            "results/{release}/model/README.md",
            caption="../report/release_card.rst",
            category="Releases",
            subcategory="{release}",
            labels={"figure": "card"},
        ),
    log:
        "logs/release_card/{release}.log",
    benchmark:
        "results/benchmarks/release_card/{release}.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("release_card"),
        runtime=run_time_of("release_card"),
    params:
        *code_and_libraries("release_card"),
        subject=card_subject,
    script:
        "../scripts/release_card.py"


rule plot_build:
    input:
        records=build_records,
    output:
        loss=report(
            "results/card/loss.png",
            caption="../report/loss.rst",
            category="Build",
            labels={"figure": "loss by depth"},
        ),
        hidden_states=report(
            "results/card/hidden_states.png",
            caption="../report/hidden_states.rst",
            category="Build",
            labels={"figure": "error of the hidden states"},
        ),
    log:
        "logs/plot_build.log",
    benchmark:
        "results/benchmarks/plot_build.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("plot_build"),
        runtime=run_time_of("plot_build"),
    params:
        *code_and_libraries("plot_build"),
        subjects=card_subjects,
    script:
        "../scripts/plot_build.py"


rule plot_experts:
    input:
        records=build_records,
    output:
        experts=report(
            "results/card/experts.png",
            caption="../report/experts.rst",
            category="Build",
            labels={"figure": "tokens per expert"},
        ),
    log:
        "logs/plot_experts.log",
    benchmark:
        "results/benchmarks/plot_experts.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("plot_experts"),
        runtime=run_time_of("plot_experts"),
    params:
        *code_and_libraries("plot_experts"),
        subjects=card_subjects,
    script:
        "../scripts/plot_experts.py"


rule card:
    input:
        records=build_records,
        provenance=release_provenance(),
        hashes=release_hashes(),
        pictures=build_pictures,
        experts=expert_pictures,
        saliency=saliency_pictures,
    output:
        card=report(
            "model_card.md",
            caption="../report/model_card.rst",
            category="Build",
            labels={"figure": "card"},
        ),
    log:
        "logs/card.log",
    benchmark:
        "results/benchmarks/card.tsv"
    conda:
        "../envs/requant.yaml"
    resources:
        mem_mb=memory_of("card"),
        runtime=run_time_of("card"),
    params:
        *code_and_libraries("card"),
        subjects=card_subjects,
    script:
        "../scripts/card.py"
