# Makes the virtual environment of this checkout and installs the project in it; sourced by examples/quickstart/run.sh and
# tests/run.sh from the repository's root. Sets VENV. Skips what an unchanged setup.py and constraints have installed.
#
#   PYTHON=python3.12   another interpreter (default: python3.11, else python3); each minor version has its own folder

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$(command -v python3.11 || command -v python3) || { echo "no Python found: install Python 3.11" >&2; exit 1; }
fi
_minor=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV=$PWD/.venv
[ "$_minor" = 3.11 ] || VENV=$PWD/.venv-$_minor
_wanted=$("$PYTHON" -V; cat setup.py tests/constraints.txt tools/install_venv.sh)
_stamp=$VENV/installed-from

if [ ! -f "$_stamp" ] || [ "$(cat "$_stamp")" != "$_wanted" ]; then
  echo "Installing into ${VENV#"$PWD"/} (a few minutes the first time) ..."
  rm -f "$_stamp"
  if [ ! -x "$VENV/bin/python" ] && ! "$PYTHON" -m venv "$VENV" >/dev/null 2>&1; then
    # Debian keeps what `venv` needs for this in a package of its own; the system's pip fills the environment as well.
    rm -rf "$VENV"
    "$PYTHON" -m venv --without-pip "$VENV"
    "$PYTHON" -m pip -q --python "$VENV/bin/python" install pip
  fi
  _pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -q "$@"; }
  _pip install --upgrade pip
  _index=()
  if ! nvidia-smi -L >/dev/null 2>&1; then
    # No GPU: take PyTorch's CPU build, which is smaller by gigabytes, where its own index can be reached.
    _cpu=https://download.pytorch.org/whl/cpu
    if "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('$_cpu/', timeout=3)" 2>/dev/null; then
      _index=(--index-url "$_cpu")
    fi
  fi
  _pip install ${_index[@]+"${_index[@]}"} torch==2.13.0
  _pip install -c tests/constraints.txt -e '.[quickstart,test]'
  # The losses are tested against open_clip's and TRL's; the packages want torchvision and data sets, their losses do not.
  _pip install -c tests/constraints.txt --no-deps open_clip_torch trl
  printf '%s\n' "$_wanted" >"$_stamp"
fi
