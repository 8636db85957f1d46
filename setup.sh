# Sourced by reproduce.sh and tests/run.sh: a virtual environment in .venv, unless one is active or W2S_NO_VENV=1.
# It holds requirements.txt, and the file named by `also`. Each is installed again only when it has changed.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
if [ "${W2S_NO_VENV:-0}" != 1 ] && [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  . .venv/bin/activate
  for file in requirements.txt ${also:-}; do
    if ! cmp -s "$file" ".venv/${file//\//-}.installed"; then
      echo "installing $file into .venv"
      pip install --quiet --disable-pip-version-check -r "$file"
      cp "$file" ".venv/${file//\//-}.installed"
    fi
  done
fi
