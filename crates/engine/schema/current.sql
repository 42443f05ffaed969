CREATE TABLE images (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    source TEXT NOT NULL
, manifest TEXT, user TEXT, workdir TEXT) STRICT;

CREATE TABLE sandboxes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN
        ('created', 'starting', 'running', 'stopping', 'stopped', 'error', 'deleting')),
    reason TEXT,
    image TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    kernel TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'shared', 'memory')),
    workdir TEXT,
    user TEXT,
    ttl_ms INTEGER,
    ephemeral INTEGER NOT NULL CHECK (ephemeral IN (0, 1)),
    engine TEXT,
    accel TEXT,
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    stopped_ms INTEGER,
    boot_id TEXT,
    holder_pid INTEGER,
    holder_start INTEGER,
    vmm_pid INTEGER,
    vmm_start INTEGER
, paused_ms INTEGER, pool_id TEXT, network TEXT NOT NULL DEFAULT 'off'
    CHECK (network IN ('off', 'listed', 'open')), authorized_keys TEXT) STRICT;

CREATE TABLE sandbox_env (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, name)
) STRICT;

-- One sandbox at a time writes to the layer that belongs to an image.
CREATE UNIQUE INDEX one_shared_writer ON sandboxes (image_digest)
    WHERE disk_mode = 'shared' AND state IN ('starting', 'running', 'stopping');

-- Names and networks a sandbox may reach, in the order they were given.
CREATE TABLE sandbox_allowed (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, position)
) STRICT;

-- What a sandbox that runs has of the host's network. Written before anything of it is made.
CREATE TABLE sandbox_networks (
    sandbox_id TEXT PRIMARY KEY REFERENCES sandboxes (id) ON DELETE CASCADE,
    -- Where device and rules are: on the host, or in a network namespace of the keeper's own, with
    -- which they go.
    mode TEXT NOT NULL CHECK (mode IN ('tap', 'user')),
    -- As a number, so that the next free one can be found by counting.
    address INTEGER NOT NULL CHECK (address BETWEEN 0 AND 4294967295),
    device TEXT NOT NULL UNIQUE CHECK (length(device) = 15),
    -- 48 random bits, new with every start: connections are known by them.
    run INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX sandbox_networks_by_address ON sandbox_networks (address) WHERE mode = 'tap';

CREATE TABLE host_facts (
    name TEXT PRIMARY KEY,
    boot_id TEXT NOT NULL,
    value TEXT NOT NULL
) STRICT;

CREATE INDEX pool_members ON sandboxes (pool_id) WHERE pool_id IS NOT NULL;

-- Machines as they were at one moment, to start others from.
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    -- `making` and `deleting` belong to a process; without it they are leftovers.
    state TEXT NOT NULL CHECK (state IN ('making', 'ready', 'deleting')),
    sandbox TEXT NOT NULL,
    image TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    kernel TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'memory')),
    workdir TEXT,
    user TEXT,
    created_ms INTEGER NOT NULL,
    boot_id TEXT,
    holder_pid INTEGER,
    holder_start INTEGER
, network TEXT NOT NULL DEFAULT 'off'
    CHECK (network IN ('off', 'listed', 'open')), nic INTEGER NOT NULL DEFAULT 0 CHECK (nic IN (0, 1)), authorized_keys TEXT) STRICT;

CREATE TABLE snapshot_env (
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot_id, name)
) STRICT;

CREATE TABLE snapshot_allowed (
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot_id, position)
) STRICT;

-- Sandboxes made ahead of demand.
CREATE TABLE pools (
    id TEXT PRIMARY KEY,
    image TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'memory')),
    nic INTEGER NOT NULL DEFAULT 0 CHECK (nic IN (0, 1)),
    size INTEGER NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    misses INTEGER NOT NULL DEFAULT 0,
    -- Why the last filling ended early.
    failure TEXT,
    created_ms INTEGER NOT NULL,
    UNIQUE (image, cpus, memory_mib, disk_mib, disk_mode, nic)
) STRICT;

-- What a member runs, each line in a shell, before it is parked.
CREATE TABLE pool_commands (
    pool_id TEXT NOT NULL REFERENCES pools (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    command TEXT NOT NULL,
    PRIMARY KEY (pool_id, position)
) STRICT;

-- Ports of the host that belong to sandboxes. A row is made before anything listens there, and goes
-- with its sandbox.
CREATE TABLE ports (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    purpose TEXT NOT NULL CHECK (purpose IN ('published', 'ssh')),
    protocol TEXT NOT NULL CHECK (protocol IN ('tcp', 'udp')),
    host_address TEXT NOT NULL,
    host_port INTEGER NOT NULL CHECK (host_port BETWEEN 1 AND 65535),
    -- Absent for SSH, which no port of the guest serves.
    guest_port INTEGER CHECK (guest_port BETWEEN 1 AND 65535),
    PRIMARY KEY (protocol, host_address, host_port),
    CHECK ((purpose = 'ssh') = (guest_port IS NULL))
) STRICT;

CREATE INDEX ports_of_sandbox ON ports (sandbox_id);

CREATE UNIQUE INDEX one_ssh_port ON ports (sandbox_id) WHERE purpose = 'ssh';
-- What an image says of the commands that are run in it: ENV,
CREATE TABLE image_env (
    image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (image, name)
) STRICT;

-- ENTRYPOINT and CMD.
CREATE TABLE image_words (
    image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
    part TEXT NOT NULL CHECK (part IN ('entrypoint', 'cmd')),
    position INTEGER NOT NULL,
    word TEXT NOT NULL,
    PRIMARY KEY (image, part, position)
) STRICT;
-- Disks that outlive the sandboxes which use them.
CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    -- `making` and `deleting` belong to a process; without it they are leftovers.
    state TEXT NOT NULL CHECK (state IN ('making', 'ready', 'deleting')),
    size_mib INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    boot_id TEXT,
    holder_pid INTEGER,
    holder_start INTEGER
) STRICT;

-- Which volumes a sandbox has, and where. A volume is not removed while it is in here.
CREATE TABLE sandbox_volumes (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    volume_id TEXT NOT NULL REFERENCES volumes (id) ON DELETE RESTRICT,
    target TEXT NOT NULL,
    read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    PRIMARY KEY (sandbox_id, position),
    UNIQUE (sandbox_id, volume_id),
    UNIQUE (sandbox_id, target)
) STRICT;

CREATE INDEX sandboxes_of_volume ON sandbox_volumes (volume_id);

-- Which directories of the host a sandbox sees, and where.
CREATE TABLE sandbox_mounts (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    source TEXT NOT NULL,
    target TEXT NOT NULL,
    read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    PRIMARY KEY (sandbox_id, position),
    UNIQUE (sandbox_id, target)
) STRICT;

-- What an image says beside its commands: LABEL,
CREATE TABLE image_labels (
    image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (image, name)
) STRICT;

-- and EXPOSE, as PORT/PROTOCOL.
CREATE TABLE image_ports (
    image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
    port TEXT NOT NULL,
    PRIMARY KEY (image, port)
) STRICT;

-- Writable layers that builds keep, each found by everything that it came from. Its disk lies in a
-- directory named after its key, and is there before the row.
CREATE TABLE build_layers (
    key TEXT PRIMARY KEY CHECK (length(key) = 64),
    -- Root file system of the image that it is a layer over.
    base_digest TEXT NOT NULL,
    disk_mib INTEGER NOT NULL,
    -- The instruction, for people.
    step TEXT NOT NULL,
    -- Root file system of the image that was made of layer and base, if one was.
    image_digest TEXT,
    created_ms INTEGER NOT NULL
) STRICT;

-- Users that VMMs run as which are locked in. Written before anything of a jail is made, and removed
-- after everything of it is gone.
CREATE TABLE jails (
    -- Of the sandbox, or of a template that is made for none.
    id TEXT PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 64),
    -- The user's number, and the group's.
    user INTEGER NOT NULL UNIQUE CHECK (user BETWEEN 1 AND 4294967294),
    -- Who has it made. For one that is no sandbox's nobody else would say whether it is still needed.
    maker_pid INTEGER NOT NULL,
    maker_start_ticks INTEGER NOT NULL,
    maker_boot_id TEXT NOT NULL
) STRICT;
