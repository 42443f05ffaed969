# Puts Debian's newest cloud kernel into the tree that mmdebstrap is making. The package is unpacked
# rather than installed: its scripts would make an initial RAM file system that nobody needs.
#
# A hook of mmdebstrap(1), given the tree.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
cd "$1/var/tmp"
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9]\)/\1/p' | head -n 1)
apt-get -q -o APT::Sandbox::User=root download "$package"
dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x -C "$1" --keep-directory-symlink --exclude=./usr/share
rm "$package"_*.deb
chroot "$1" depmod "${package#linux-image-}"
