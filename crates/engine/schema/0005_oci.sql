-- Digest of the manifest by which a registry or an archive knows an image; none for one made here.
ALTER TABLE images ADD COLUMN manifest TEXT;

-- What an image says of the commands that are run in it: USER and WORKDIR,
ALTER TABLE images ADD COLUMN user TEXT;
ALTER TABLE images ADD COLUMN workdir TEXT;

-- ENV,
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
