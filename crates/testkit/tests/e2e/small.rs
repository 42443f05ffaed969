//! Guests on the small kernel: found without being asked for, and able to do what sandboxes need.

use smolvm_testkit::Home;

/// What programs in a sandbox may count on, each tried and named. Prints what does not work.
const FEATURES: &str = r#"
import ctypes, os, select, socket, subprocess, tempfile
libc = ctypes.CDLL(None, use_errno=True)
failed = []
def check(name, work):
    try:
        if work() is False: failed.append(name)
    except Exception as error: failed.append(f"{name}: {error}")
def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def mounted(kind, options=None):
    dir = tempfile.mkdtemp(dir="/tmp")
    data = options.encode() if options else None
    if libc.mount(b"none", dir.encode(), kind.encode(), 0, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    libc.umount2(dir.encode(), 2)
filesystems = open("/proc/filesystems").read().split()
for name in "ext4 erofs overlay tmpfs devtmpfs proc sysfs cgroup2 fuse virtiofs 9p mqueue devpts binfmt_misc bpf".split():
    check(f"file system {name}", lambda: name in filesystems)
for kind in "tmpfs mqueue binfmt_misc cgroup2 bpf".split():
    check(f"mount {kind}", lambda: mounted(kind))
for space in "user pid net ipc uts mnt cgroup time".split():
    check(f"namespace {space}", lambda: os.path.exists(f"/proc/self/ns/{space}"))
check("unshare", lambda: subprocess.run(
    ["unshare", "-Urpfnm", "--mount-proc", "true"], check=True, capture_output=True))
for name, family, kind in [("inet", socket.AF_INET, socket.SOCK_STREAM),
                           ("inet6", socket.AF_INET6, socket.SOCK_STREAM),
                           ("packet", socket.AF_PACKET, socket.SOCK_RAW),
                           ("netlink", socket.AF_NETLINK, socket.SOCK_RAW),
                           ("vsock", socket.AF_VSOCK, socket.SOCK_STREAM)]:
    check(f"socket {name}", lambda: socket.socket(family, kind).close())
check("socketpair", lambda: socket.socketpair()[0].close())
check("tun", lambda: os.stat("/dev/net/tun") and None)
check("fuse device", lambda: os.stat("/dev/fuse") and None)
check("loop device", lambda: os.stat("/dev/loop-control") and None)
check("random device", lambda: os.stat("/dev/hwrng") and None)
check("epoll", lambda: select.epoll().close())
check("eventfd", lambda: call(290, 0, 0))
check("signalfd", lambda: call(289, -1, ctypes.byref(ctypes.c_uint64(0)), 8, 0))
check("timerfd", lambda: call(283, 1, 0))
check("inotify", lambda: call(294, 0))
check("fanotify", lambda: call(300, 0, 0))
check("memfd", lambda: os.memfd_create("x"))
check("userfaultfd", lambda: call(323, 0))
check("io_uring", lambda: call(425, 4, ctypes.create_string_buffer(120)))
check("aio", lambda: call(206, 1, ctypes.byref(ctypes.c_uint64(0))))
check("pidfd", lambda: os.pidfd_open(os.getpid()))
check("shared memory", lambda: call(29, 0, 4096, 0o600))
check("semaphores", lambda: call(64, 0, 1, 0o600))
check("messages", lambda: call(68, 0, 0o600))
check("message queue", lambda: call(240, b"q", os.O_CREAT | os.O_RDWR, 0o600, None))
check("membarrier", lambda: call(324, 0, 0, 0))
check("posix timers", lambda: call(222, 1, None, ctypes.byref(ctypes.c_int(0))))
check("seccomp", lambda: "Seccomp_filters:" in open("/proc/self/status").read())
check("pty", lambda: os.openpty())
check("smaps", lambda: "Rss:" in open("/proc/self/smaps").read())
controllers = open("/sys/fs/cgroup/cgroup.controllers").read().split()
for name in "cpu memory pids io cpuset".split():
    check(f"controller {name}", lambda: name in controllers)
def acl():
    with open("/root/acl", "w"): pass
    os.setxattr("/root/acl", "user.x", b"y")
    os.setxattr("/root/acl", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    return os.getxattr("/root/acl", "user.x") == b"y"
check("extended attributes", acl)
print("\n".join(failed))
"#;

#[test]
fn a_sandbox_gets_the_small_kernel_and_keeps_its_disk() {
    let home = Home::with(2).small_kernel().make();
    home.create("stock", &["--kernel", "stock"]);
    home.create("box", &["--cpus", "2"]);
    let kernel = |name: &str| home.info(name).json["kernel"].as_str().map(str::to_owned);
    assert_eq!(kernel("stock").as_deref(), Some("stock"));
    let key = kernel("box").expect("a kernel");
    assert!(key.starts_with("small-"), "{key}");
    assert!(!home.sh("stock", "uname -r").contains("smolvm"));
    assert_eq!(
        home.sh(
            "box",
            "uname -r | sed s/.*-//; nproc; echo hello > /srv/a; sync"
        ),
        "smolvm\n2\n"
    );
    // From a template before, by a boot now.
    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(
        home.sh("box", "cat /srv/a; nproc; uname -r | sed s/.*-//"),
        "hello\n2\nsmolvm\n"
    );

    // A kernel that is used stays; without users it may go.
    home.smolvm(["kernel", "rm", &key])
        .run()
        .expect(1)
        .complains_of(&["is used by sandbox `box`", "smolvm rm"]);
    home.rm(&["box", "stock"]);
    home.smolvm(["kernel", "rm", &key]).run().ok();
    let kernels = home.json(["kernel", "ls"]);
    assert_eq!(kernels["kernels"][0]["key"], "stock");
    assert_eq!(kernels["kernels"][0]["default"], true);
}

#[test]
fn the_small_kernel_has_what_programs_need() {
    let home = Home::with(1).small_kernel().make();
    home.create("box", &["--kernel", "small"]);
    let failed = home.exec("box", &["python3", "-c", FEATURES]).ok().out();
    assert_eq!(failed.trim(), "", "these do not work");
    home.rm(&["box"]);
}

#[test]
fn the_clock_of_a_small_kernel_runs_at_the_hosts_rate() {
    let home = Home::with(1).small_kernel().make();
    home.create("box", &["--cpus", "2"]);
    // A timer of half a second, by the time-stamp counter on which the clock is based: the two would
    // differ if the timer's rate were not what the machine says.
    let script = "import time; a = time.monotonic(); time.sleep(0.5); print(time.monotonic() - a)";
    let shortest = (0..5)
        .map(|_| {
            let said = home.exec("box", &["python3", "-c", script]).ok().out();
            said.trim().parse::<f64>().expect("seconds")
        })
        .fold(f64::INFINITY, f64::min);
    assert!((0.5..0.75).contains(&shortest), "{shortest} s");
    home.rm(&["box"]);
}
