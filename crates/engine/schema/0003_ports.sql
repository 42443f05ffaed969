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
