# requant under Nix: `nix run` builds the card, `nix develop` has every tool, `nix flake check` runs the tests.
# docs/environment.md says what of this has been run.
{
  description = "requant: quantized mixture-of-experts releases as one Snakemake graph";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      system = "x86_64-linux";
      pkgs = nixpkgs.legacyPackages.${system};
      inherit (pkgs) lib;
      python = pkgs.python311;

      # The lists that pip reads elsewhere too: one set of pins for both worlds.
      locks = {
        build = ./envs/build.lock;
        requirements = ./envs/requirements.lock;
        cuda = ./envs/torch-cuda.lock;
        cpu = ./envs/torch-cpu.lock;
        test = ./envs/test.lock;
      };

      # Fetched with the network, so the content of each folder is pinned as a whole besides pip's check of every
      # file. Its hash belongs to certain locks: with others, evaluation ends here, not after gigabytes.
      pinned = builtins.fromJSON (builtins.readFile ./envs/wheelhouse.json);
      wheelhouse =
        name:
        let
          inherit (pinned.${name}) hash locks;
          names = builtins.attrNames locks;
          changed = builtins.filter (
            lock: builtins.hashFile "sha256" (./envs + "/${lock}") != locks.${lock}
          ) names;
        in
        if changed != [ ] then
          throw "envs/wheelhouse.json is of another ${toString changed}: `make wheelhouses` makes it anew"
        else
          pkgs.runCommand "requant-wheels-${name}" {
            nativeBuildInputs = [
              python
              pkgs.cacert
            ];
            # A mirror is named as it is for pip.
            impureEnvVars = lib.fetchers.proxyImpureEnvVars ++ [
              "PIP_INDEX_URL"
              "PIP_EXTRA_INDEX_URL"
            ];
            outputHashMode = "recursive";
            outputHashAlgo = "sha256";
            outputHash = hash;
          } "python ${./envs}/wheelhouse.py $out --locks ${toString (map (lock: "${./envs}/${lock}") names)}";

      # The CPU build of torch is on an index of its own, which no file here names: who wants it hands it over.
      cpuWheel =
        let
          pin = builtins.match ".*torch==([^ ]+) .*--hash=sha256:([0-9a-f]+)\n" (builtins.readFile locks.cpu);
          wheel = pkgs.requireFile {
            name = "torch-${builtins.elemAt pin 0}-cp311-cp311-manylinux_2_28_x86_64.whl";
            sha256 = builtins.elemAt pin 1;
            message = ''
              The CPU build of torch is not on pip's default index. Fetch the wheel that envs/torch-cpu.lock names, with
              Python 3.11 and an index that has it, and hand it to Nix:
                pip download --no-deps --require-hashes --requirement envs/torch-cpu.lock
                nix-store --add-fixed sha256 torch-*.whl
            '';
          };
        in
        pkgs.linkFarm "requant-wheels-cpu" [
          {
            inherit (wheel) name;
            path = wheel;
          }
        ];

      pip = "bin/python -m pip install --no-index --no-deps --require-hashes --no-build-isolation";

      # Where the drivers of the host are found. Triton would ask ldconfig.
      drivers = "${pkgs.addDriverRunpath.driverLink}/lib";

      # What the jobs of the graph run in: nothing of requant itself, so that its store path names the environment.
      environmentWith =
        {
          variant,
          wheels,
          libraries ? [ ],
          runpaths ? [ ],
        }:
        let
          from = "--find-links ${wheelhouse "base"} --find-links ${wheels}";
        in
        pkgs.stdenv.mkDerivation {
          name = "requant-environment-${variant}";
          dontUnpack = true;
          dontStrip = true;
          nativeBuildInputs = [ pkgs.autoPatchelfHook ];
          # Every name that a library of the wheels needs and no wheel has: libgcc_s, libgomp and libstdc++, libz, and
          # libtbb (of numba's threads).
          buildInputs = [
            python
            pkgs.onetbb
            pkgs.stdenv.cc.cc.lib
            pkgs.zlib
          ]
          ++ libraries;
          # libcuda belongs to the driver of the host. Each other library must be found.
          autoPatchelfIgnoreMissingDeps = [ "libcuda.so.1" ];
          # Where libraries find what they load by name while they run.
          appendRunpaths = [ "$ORIGIN" ] ++ runpaths;
          installPhase = ''
            runHook preInstall
            ${python}/bin/python -m venv $out
            $out/${pip} ${from} --requirement ${locks.build}
            $out/${pip} ${from} --requirement ${locks.requirements} --requirement ${locks.${variant}}
            $out/bin/python -m pip check
            runHook postInstall
          '';
        };

      environment = environmentWith {
        variant = "cuda";
        wheels = wheelhouse "cuda";
        # What the plugins of NVSHMEM and cuFile need: libfabric, libmpi and liboshmem, libpmix, libibverbs, libmlx5 and
        # librdmacm, libucp and libucs.
        libraries = [
          pkgs.libfabric
          pkgs.openmpi
          pkgs.pmix
          pkgs.rdma-core
          pkgs.ucx
        ];
        runpaths = map (part: "${placeholder "out"}/${python.sitePackages}/nvidia/${part}/lib") [
          "cu13"
          "cudnn"
          "cusparselt"
          "nccl"
          "nvshmem"
        ]
        ++ [ drivers ];
      };
      cpu = environmentWith {
        variant = "cpu";
        wheels = cpuWheel;
      };

      # The test tools stand before the environment, not in it.
      testing = pkgs.stdenv.mkDerivation {
        name = "requant-test-tools";
        dontUnpack = true;
        dontStrip = true;
        nativeBuildInputs = [ pkgs.autoPatchelfHook ];
        buildInputs = [
          python
          pkgs.stdenv.cc.cc.lib
        ];
        installPhase = ''
          runHook preInstall
          ${python}/bin/python -m venv $out
          $out/${pip} --find-links ${wheelhouse "base"} --requirement ${locks.build}
          $out/${pip} --find-links ${wheelhouse "test"} --requirement ${locks.test}
          echo "import site; site.addsitedir('${environment}/${python.sitePackages}')" \
            > $out/${python.sitePackages}/requant-environment.pth
          $out/bin/python -m pip check
          runHook postInstall
        '';
      };

      # What a build reads: a changed sentence of the docs makes no job stale.
      workflow = lib.fileset.toSource {
        root = ./.;
        fileset = lib.fileset.unions [
          ./Snakefile
          ./benchmarks/results
          ./config
          ./config.yaml
          ./demo
          ./envs
          ./flake.lock
          ./locks
          ./profiles
          ./report
          ./rules
          ./scripts
          ./src
        ];
      };

      # The compiler is for what Triton and torch compile while they run.
      programs = environment: [
        environment
        pkgs.bashInteractive
        pkgs.coreutils
        pkgs.stdenv.cc
      ];

      app = environment: name: command: {
        type = "app";
        program = "${
          pkgs.writeShellApplication {
            inherit name;
            runtimeInputs = programs environment;
            text = ''
              export REQUANT_ENVIRONMENT=${environment} PYTHONNOUSERSITE=1 TRITON_LIBCUDA_PATH=${drivers}
              export REQUANT_REVISION=${self.rev or self.dirtyRev or ""}
              ${command}
            '';
          }
        }/bin/${name}";
      };
      # From any directory: what it makes is there, and nothing is written beside the Snakefile.
      card =
        environment:
        app environment "requant-card" ''
          if [ $# -eq 0 ]; then
            set -- --cores all model_card.md
          fi
          exec snakemake --snakefile ${workflow}/Snakefile "$@"
        '';

      requant = pkgs.writeShellApplication {
        name = "requant";
        text = ''exec python -m requant "$@"'';
      };
      tools = [
        testing
        requant
        pkgs.git
        pkgs.gnumake
      ]
      ++ programs environment;
    in
    {
      packages.${system} = {
        default = environment;
        inherit cpu testing;
        wheels-base = wheelhouse "base";
        wheels-cpu = cpuWheel;
        wheels-cuda = wheelhouse "cuda";
        wheels-test = wheelhouse "test";
      };

      apps.${system} = {
        default = card environment;
        cpu = card cpu;
        requant = app environment "requant" ''PYTHONPATH=${workflow}/src exec python -m requant "$@"'';
      };

      devShells.${system}.default = pkgs.mkShell {
        packages = tools ++ [ pkgs.nix ];
        REQUANT_ENVIRONMENT = environment;
        PYTHONNOUSERSITE = 1;
        TRITON_LIBCUDA_PATH = drivers;
        shellHook = ''export PYTHONPATH=$PWD/src'';
      };

      checks.${system}.default = pkgs.stdenv.mkDerivation {
        name = "requant-tests";
        src = self;
        nativeBuildInputs = tools;
        REQUANT_ENVIRONMENT = environment;
        PYTHONNOUSERSITE = 1;
        dontConfigure = true;
        buildPhase = ''
          export HOME=$TMPDIR PYTHONPATH=$PWD/src
          snakefmt --check Snakefile rules
          ruff check
          snakemake --lint
          python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not nix"
        '';
        installPhase = "touch $out";
      };
    };
}
