# The environment of `make card` under Nix: `nix develop`, then `snakemake --cores all model_card.md`; or
# `nix run . -- --cores all model_card.md`. docs/environment.md says what of this has been run.
{
  description = "requant: quantized mixture-of-experts releases as one Snakemake graph";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      system = "x86_64-linux";
      pkgs = nixpkgs.legacyPackages.${system};
      python = pkgs.python311;

      # The lists that pip reads elsewhere too: one set of pins for both worlds.
      locks = [
        ./envs/build.lock
        ./envs/requirements.lock
        ./envs/torch-cuda.lock
      ];
      requirements = pkgs.lib.concatMapStringsSep " " (lock: "--requirement ${lock}") locks;

      # Fetched with the network, so its content is pinned as a whole besides pip's check of every file. When a
      # lock changes, this hash does: docs/environment.md says how to get the new one.
      wheels =
        pkgs.runCommand "requant-wheels"
          {
            nativeBuildInputs = [
              (python.withPackages (packages: [
                packages.pip
                packages.setuptools
              ]))
              pkgs.cacert
            ];
            outputHashMode = "recursive";
            outputHashAlgo = "sha256";
            outputHash = "sha256-V4DPJgwzYv1GgI0FoEpkthUIIVJ00tMgNaDgugwDh+c=";
          }
          ''
            python -m pip download --quiet --no-cache-dir --require-hashes --no-deps --no-build-isolation \
              --dest $out ${requirements}
          '';

      environment = pkgs.stdenv.mkDerivation {
        name = "requant-environment";
        dontUnpack = true;
        nativeBuildInputs = [ pkgs.autoPatchelfHook ];
        buildInputs = [
          python
          pkgs.stdenv.cc.cc.lib
          pkgs.zlib
        ];
        # libcuda belongs to the driver of the host. Each other library must be found.
        autoPatchelfIgnoreMissingDeps = [ "libcuda.so.1" ];
        installPhase = ''
          ${python}/bin/python -m venv $out
          $out/bin/python -m pip install --no-index --find-links ${wheels} --no-deps --requirement ${./envs/build.lock}
          $out/bin/python -m pip install --no-index --find-links ${wheels} --no-deps --no-build-isolation ${requirements}
          $out/bin/python -m pip install --no-index --no-deps --no-build-isolation ${self}
        '';
      };
    in
    {
      packages.${system} = {
        inherit wheels;
        default = environment;
      };

      devShells.${system}.default = pkgs.mkShell {
        packages = [
          environment
          pkgs.git
        ];
      };

      apps.${system}.default = {
        type = "app";
        program = "${
          pkgs.writeShellApplication {
            name = "requant";
            runtimeInputs = [ environment ];
            text = ''snakemake --snakefile ${self}/Snakefile "$@"'';
          }
        }/bin/requant";
      };
    };
}
