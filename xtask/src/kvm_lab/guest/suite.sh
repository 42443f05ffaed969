# The lab's tests. Their list follows; it is written anew for each run.
export SMOLVM_TEST_BINARIES=/cargo/bin SMOLVM_TEST_DATA=/scratch/data RUST_BACKTRACE=1 RUSTC_BOOTSTRAP=1
failed=0

# run NAME COMMAND...: one test program. What is shown of it, its caller on the host counts.
run() {
    local name=$1
    shift
    echo "     Running $name"
    "$@" -Z unstable-options --report-time || failed=1
}

# Test programs look for files of theirs where they were built.
repository=$(cat /cargo/lab/repository)
mkdir -p "$(dirname "$repository")"
ln -s /cargo/repository "$repository"
# Kernels and image, with room to write beside them.
mkdir -p /scratch/data /scratch/over/{upper,work}
mount -t overlay -o lowerdir=/cargo/data,upperdir=/scratch/over/upper,workdir=/scratch/over/work data /scratch/data
