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
