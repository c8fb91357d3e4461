# Stands in for nixpkgs where flake.nix is evaluated without a network: the few names that it uses, as derivations
# that nobody builds. Fixed outputs keep their hashes, and a file set its files, so that a hash that is malformed and a
# file that is not there are errors here too.
{
  outputs =
    { self }:
    let
      system = "x86_64-linux";
      derive =
        name: attributes:
        derivation (
          {
            inherit name system;
            builder = "/bin/sh";
          }
          // attributes
        );
      packages =
        names:
        builtins.listToAttrs (
          map (name: {
            inherit name;
            value = derive name { };
          }) names
        );
      mkDerivation = { name, ... }@attributes: derive name attributes;
    in
    {
      legacyPackages.${system} =
        packages [
          "autoPatchelfHook"
          "bashInteractive"
          "cacert"
          "coreutils"
          "git"
          "gnumake"
          "libfabric"
          "nix"
          "onetbb"
          "openmpi"
          "pmix"
          "rdma-core"
          "ucx"
          "zlib"
        ]
        // {
          lib = {
            fetchers.proxyImpureEnvVars = [ "https_proxy" ];
            fileset = {
              unions =
                paths:
                map (
                  path: if builtins.pathExists path then path else throw "file set: ${toString path} does not exist"
                ) paths;
              toSource =
                { root, fileset }:
                let
                  inside = path: part: path == part || builtins.substring 0 (builtins.stringLength "${part}/") path == "${part}/";
                  wanted = path: part: inside path (toString part) || inside (toString part) path;
                in
                builtins.path {
                  name = "source";
                  path = root;
                  filter = path: _: builtins.any (wanted path) fileset;
                };
            };
          };
          stdenv = {
            inherit mkDerivation;
            cc = derive "gcc" { } // {
              cc.lib = derive "gcc-lib" { };
            };
          };
          python311 = derive "python311" { } // {
            sitePackages = "lib/python3.11/site-packages";
          };
          addDriverRunpath.driverLink = "/run/drivers";
          runCommand =
            name: attributes: script:
            derive name (attributes // { inherit script; });
          requireFile =
            {
              name,
              sha256,
              message,
            }:
            derive name {
              inherit message;
              outputHashMode = "flat";
              outputHashAlgo = "sha256";
              outputHash = sha256;
            };
          linkFarm = name: entries: derive name { paths = map (entry: "${entry.name} ${entry.path}") entries; };
          mkShell = { packages, ... }@attributes: derive "shell" attributes;
          writeShellApplication =
            {
              name,
              text,
              runtimeInputs ? [ ],
            }:
            derive name { inherit text runtimeInputs; };
        };
    };
}
