# Stands in for nixpkgs where flake.nix is evaluated without a network: the few names that it uses, as derivations
# that nobody builds. Fixed outputs keep their hashes, so that a missing or malformed one is an error here too.
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
      package = name: derive name { };
      strings = values: toString values;
      mkDerivation = { name, ... }@attributes: derive name attributes;
    in
    {
      legacyPackages.${system} = {
        lib.concatMapStringsSep =
          separator: function: values:
          builtins.concatStringsSep separator (map function values);
        stdenv = {
          inherit mkDerivation;
          cc.cc.lib = package "gcc-lib";
        };
        python311 = package "python311" // {
          withPackages =
            choose:
            derive "python311-env" {
              packages = strings (choose {
                pip = package "pip";
                setuptools = package "setuptools";
              });
            };
        };
        autoPatchelfHook = package "auto-patchelf-hook";
        cacert = package "cacert";
        git = package "git";
        zlib = package "zlib";
        runCommand =
          name: attributes: script:
          derive name (attributes // { inherit script; });
        mkShell = { packages }: derive "shell" { packages = strings packages; };
        writeShellApplication =
          {
            name,
            runtimeInputs,
            text,
          }:
          derive name {
            inherit text;
            inputs = strings runtimeInputs;
          };
      };
    };
}
