# Sourced by the tools: makes sure that what they need is installed, and says what is missing where it cannot be.
# Quick when all is there: one stamp file is compared.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

say() { printf '%s\n' "$*" >&2; }

# need_packages PACKAGE... : Debian packages, installed with apt (and sudo when not root) where they are missing.
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    command -v apt-get >/dev/null || { say "Please install: ${missing[*]} (this machine has no apt-get)."; exit 1; }
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || [ -t 0 ] || { say "Please run: sudo apt-get install ${missing[*]}"; exit 1; }
        sudo=(sudo)
    fi
    say "Installing ${missing[*]} ..."
    # a list of packages may be missing or old on a fresh machine: fetch it, then try once more
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null 2>&1 ||
        { "${sudo[@]}" apt-get update -qq &&
          "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null; } ||
        { say "Could not install ${missing[*]}. Please run: apt-get install ${missing[*]}"; exit 1; }
}

# need_python : .venv with hagroup and its development tools.
need_python() {
    local python stamp
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || need_packages python3
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { say "hagroup needs Python 3.11 or newer; $python is $("$python" -V). Set PYTHON=/path/to/python3.11."; exit 1; }
    stamp="$venv/.installed-$(sha256sum "$root/pyproject.toml" | cut -c1-16)"
    [ -e "$stamp" ] && return 0
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need_packages python3-venv
    say "Installing the Python packages into .venv ..."
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e "$root[dev]" >&2 ||
        { say "pip could not install the Python packages; see above."; exit 1; }
    rm -f "$venv"/.installed-*
    touch "$stamp"
}
