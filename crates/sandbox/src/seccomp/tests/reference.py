"""Writes the reference filter to standard output: Docker's default profile as libseccomp compiles it.

Arguments: `native` (x86_64 alone, also with calls that are newer than this libseccomp) or `all` (with i386 and x32, as Docker does), then
the names of the capabilities that the container has.

The profile is what moby publishes as a Go module, the way from it to rules is that of moby's setupSeccomp: a rule counts where its
capabilities, architecture and kernel are given and none of those it excludes. Needs Debian's packages python3-seccomp and golang-go.
"""
import json
import os
import subprocess
import sys
import tempfile

import seccomp

MODULE = "github.com/moby/profiles/seccomp@v0.3.0"
# What the Go checksum database says of it.
SUM = "h1:1vJ94fIWXz206DLWq7ddPD6qLP82N7351JI/9iGy3IY="
# Calls that libseccomp 2.5.4 does not know yet, by include/uapi/asm-generic/unistd.h; uretprobe is x86's own.
NEWER = {
    "uretprobe": 335,
    "statmount": 457,
    "listmount": 458,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
}
COMPARISONS = {
    "SCMP_CMP_EQ": seccomp.EQ,
    "SCMP_CMP_NE": seccomp.NE,
    "SCMP_CMP_LT": seccomp.LT,
    "SCMP_CMP_LE": seccomp.LE,
    "SCMP_CMP_GT": seccomp.GT,
    "SCMP_CMP_GE": seccomp.GE,
}


def profile():
    """Moby's default.json."""
    environment = {**os.environ, "GOFLAGS": "-mod=mod", "GONOSUMDB": "*", "GOTOOLCHAIN": "local"}
    with tempfile.TemporaryDirectory() as empty:
        said = subprocess.run(
            ["go", "mod", "download", "-json", MODULE], cwd=empty, env=environment, stdout=subprocess.PIPE, check=False
        )
    module = json.loads(said.stdout)
    if "Error" in module or module["Sum"] != SUM:
        sys.exit(f"{MODULE} is not to be had: {module}")
    with open(os.path.join(module["Dir"], "default.json"), encoding="utf-8") as file:
        return json.load(file)


def counts(rule, capabilities):
    """Whether a rule holds for such a container, on x86_64 and a kernel since 4.8."""
    includes, excludes = rule.get("includes", {}), rule.get("excludes", {})
    if includes.get("minKernel", "4.8") != "4.8" or "minKernel" in excludes:
        sys.exit(f"a rule for kernels that this program does not know: {rule}")
    return (
        "amd64" in includes.get("arches", ["amd64"])
        and capabilities.issuperset(includes.get("caps", []))
        and "amd64" not in excludes.get("arches", [])
        and capabilities.isdisjoint(excludes.get("caps", []))
    )


def action(name, errno):
    """An action of the profile as libseccomp has it."""
    return {"SCMP_ACT_ALLOW": seccomp.ALLOW, "SCMP_ACT_ERRNO": seccomp.ERRNO(errno)}[name]


def condition(argument):
    """A condition on an argument as libseccomp has it."""
    if argument["op"] == "SCMP_CMP_MASKED_EQ":
        return seccomp.Arg(argument["index"], seccomp.MASKED_EQ, argument["value"], argument.get("valueTwo", 0))
    return seccomp.Arg(argument["index"], COMPARISONS[argument["op"]], argument["value"])


def main(architectures, capabilities):
    """Compiles and writes."""
    config = profile()
    filter_ = seccomp.SyscallFilter(action(config["defaultAction"], config["defaultErrnoRet"]))
    if architectures == "all":
        filter_.add_arch(seccomp.Arch.X86)
        filter_.add_arch(seccomp.Arch.X32)
    for rule in config["syscalls"]:
        if not counts(rule, capabilities):
            continue
        conditions = [condition(argument) for argument in rule.get("args", [])]
        for name in rule["names"]:
            number = seccomp.resolve_syscall(seccomp.Arch(), name)
            # libseccomp cannot say what number a call that it does not know has on another architecture.
            call = name if number != -1 else NEWER.get(name) if architectures == "native" else None
            # One of another architecture, or one that is newer: Docker passes over it too.
            if call is not None:
                filter_.add_rule(action(rule["action"], rule.get("errnoRet", 1)), call, *conditions)
    filter_.export_bpf(sys.stdout.buffer)


main(sys.argv[1], set(sys.argv[2:]))
