# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# Debian packages, without installing any: apt (in a directory of our own, as whoever we are) says what a set of packages
# needs and downloads it, checked against the archive's signatures; tar unpacks it. No maintainer script runs, nothing needs
# root, and the machine's own packages are left alone.
#
# "Resolving" decides on versions. It is done once and kept, so that runs are fast, repeatable and work without a network;
# `images/setup --update` does it again.

readonly SUITE=trixie
readonly SUITE_NEW=trixie-backports

# What `toolchain` holds: all that builds a kernel with Rust and our module, as Debian's own kernel is built.
readonly ESSENTIAL_PACKAGES="base-files bash bzip2 coreutils dash diffutils findutils grep gzip libc-bin mawk perl-base sed tar util-linux"
readonly TOOLCHAIN_PACKAGES="$ESSENTIAL_PACKAGES gcc ccache make flex bison bc perl python3-minimal
    libelf-dev/$SUITE_NEW libelf1t64/$SUITE_NEW libdw1t64/$SUITE_NEW libssl-dev openssl pahole rustc rust-src bindgen rustfmt rust-clippy
    clang-19 lld-19 llvm-19 kmod cpio xz-utils zstd busybox-static linux-libc-dev libc6-dev patch rsync"

# apt_private DIR PROGRAM ARG…: an apt that knows nothing of this machine but how it reaches its mirror.
apt_private() {
    local dir=$1
    shift
    APT_CONFIG=$dir/apt.conf LC_ALL=C "$@"
}

# mirrors: where the machine's own packages come from; one of them will have Debian's suites.
mirrors() {
    if [[ -n ${PINION_MIRROR:-} ]]; then
        echo "$PINION_MIRROR"
        return
    fi
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -v security | awk '!seen[$0]++'
}

write_apt_config() {
    local dir=$1 mirror=$2 keyring=/usr/share/keyrings/debian-archive-keyring.gpg suite
    [[ -r $keyring ]] || {
        echo "reason: the keys of Debian's archive are missing ($keyring); install them: apt-get install debian-archive-keyring"
        return 1
    }
    mkdir -p "$dir"/{state/lists/partial,cache/archives/partial}
    : >"$dir/status"
    {
        # How the machine reaches its mirror: proxies, certificates, retries, checks of dates.
        apt-config dump | grep '^Acquire::' | grep -v '^Acquire::IndexTargets'
        cat <<CONFIG
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
Dir::Etc::parts "/dev/null";
Dir::Etc::main "/dev/null";
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::ForceHash "SHA256";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
CONFIG
    } >"$dir/apt.conf"
    for suite in "$SUITE" "$SUITE_NEW"; do
        echo "deb [arch=amd64 signed-by=$keyring] $mirror $suite main"
    done >"$dir/sources.list"
}

# --- Resolving -----------------------------------------------------------------------------------------------------

# resolve: sets RESOLVED to a directory with, for every set, SET.uris (as `apt-get --print-uris` writes them), and `versions`.
resolve() {
    local link
    link=$CACHE/resolved/current-$(declare -p SUITE SUITE_NEW TOOLCHAIN_PACKAGES | cat - <(declare -f resolve_sets) | hash)
    if [[ -e $link && -z ${UPDATE:-} ]]; then
        RESOLVED=$(readlink -f "$link")
        return
    fi
    need_tool apt-get apt
    need_tool dpkg-deb dpkg
    init_cache
    with_lock resolve resolve_locked "$link"
    UPDATE=
}

resolve_locked() {
    local link=$1 key was=''
    [[ ! -e $link ]] || was=$(readlink "$link")
    if [[ -n $was && -z ${UPDATE:-} ]]; then # by the run that we have been waiting for
        RESOLVED=$(readlink -f "$link")
        return
    fi
    # The key is made from the time, as the content is not known before.
    key=$(date +%s.%N | hash)
    ENTRY=$CACHE/resolved/$key MAY_FAIL=$was build_entry resolved "$key" 200 "asking the package mirror for versions" resolve_into
    rm -f "$CACHE/logs/resolved-$key.log"
    if [[ ! -e $CACHE/resolved/$key ]]; then
        say "going on with the versions found before, on $(date -r "$link" +%F)"
        RESOLVED=$(readlink -f "$link")
        return
    fi
    ln -s "$key" "$CACHE/resolved/.link.$$"
    mv -T "$CACHE/resolved/.link.$$" "$link"
    [[ -z $was || $was == "$key" ]] || remove_tree "$CACHE/resolved/$was"
    RESOLVED=$CACHE/resolved/$key
    sed "s/^/$PROGRAM:   using /" "$RESOLVED/versions" >&2
}

resolve_into() {
    local new=$1 mirror found=
    for mirror in $(mirrors); do
        remove_tree "$new/apt"
        write_apt_config "$new/apt" "$mirror"
        # Without this, an unreachable mirror is a warning only.
        if apt_private "$new/apt" apt-get update -o APT::Update::Error-Mode=any; then
            found=yes
            break
        fi
    done
    if [[ -z $found ]]; then
        echo "reason: none of the system's apt sources could be reached and has $SUITE and $SUITE_NEW (PINION_MIRROR=URI names a mirror)"
        return 1
    fi
    resolve_sets "$new"
    remove_tree "$new/apt"
}

resolve_sets() {
    local new=$1 apt=$1/apt source version headers release set
    # shellcheck disable=SC2086 # a list of packages
    apt_private "$apt" apt-get -qq --print-uris -y install $TOOLCHAIN_PACKAGES >"$new/toolchain.uris"
    apt_private "$apt" apt-get -qq --print-uris -y install -t "$SUITE_NEW" qemu-system-x86 >"$new/qemu.uris"

    # The newest kernel source of series 7, …
    source=$(apt_private "$apt" apt-cache pkgnames linux-source-7. | sort -V | tail -n 1)
    version=$(newest_version "$apt" "$source")
    apt_private "$apt" apt-get -qq --print-uris download "$source=$version" >"$new/source.uris"

    # … the one before it (the patches must apply to both), …
    source=$(apt_private "$apt" apt-cache pkgnames linux-source-7. | sort -V | tail -n 2 | head -n 1)
    apt_private "$apt" apt-get -qq --print-uris download "$source" >"$new/previous.uris"

    # … and the newest binary kernel for which the source of just that version is there.
    for headers in $(apt_private "$apt" apt-cache pkgnames linux-headers-7. | grep -E '^linux-headers-7[0-9.]+\+deb[0-9]+-cloud-amd64$' | sort -rV); do
        release=${headers#linux-headers-}
        source=linux-source-$(cut -d. -f1,2 <<<"$release")
        version=$(newest_version "$apt" "$headers")
        if [[ -n $version && $(newest_version "$apt" "$source") == "$version" && $(newest_version "$apt" "linux-binary-$release") == "$version" ]]; then
            apt_private "$apt" apt-get -qq --print-uris download "$headers=$version" "linux-binary-$release=$version" \
                "linux-base-$release=$version" >"$new/debian.uris"
            apt_private "$apt" apt-get -qq --print-uris download "$source=$version" >"$new/debian-source.uris"
            echo "$release" >"$new/debian.release"
            break
        fi
    done
    for set in toolchain qemu source previous debian debian-source; do
        test -s "$new/$set.uris" || { echo "reason: the mirror has no packages for '$set'"; return 1; }
    done
    {
        awk '{ print $2 }' "$new/source.uris"
        awk '$2 ~ /^(linux-binary-.*|qemu-system-x86|rustc|gcc-14)_/ { print $2 }' "$new/debian.uris" "$new/qemu.uris" "$new/toolchain.uris"
    } | sed -E 's/%3a/:/; s/_(amd64|all)\.deb$//; s/_/ /' | awk '!seen[$0]++' >"$new/versions"
}

newest_version() { apt_private "$1" apt-cache policy "$2" | awk '/Candidate:/ && $2 != "(none)" { print $2 }'; }

# --- Downloading and unpacking -------------------------------------------------------------------------------------

# package_key SET: changes when any package of the set does. (Not with the mirror's address.)
package_key() { awk '{ print $2, $4 }' "$RESOLVED/$1.uris" | hash; }

# unpack_packages URIS DIR: downloads what the list names and unpacks it. An interrupted download goes on where it was.
unpack_packages() {
    local uris=$1 dir=$2 pool name first
    pool=$CACHE/downloads/$(awk '{ print $2, $4 }' "$uris" | hash)
    mkdir -p "$pool" "$dir"
    download_packages "$uris" "$pool"
    # base-files first: it brings /bin -> usr/bin and its like, which directories of other packages must not replace.
    first=$(awk '$2 ~ /^base-files_/ { print $2 }' "$uris")
    [[ -z $first ]] || unpack_one "$pool/$first" "$dir"
    export -f unpack_one
    awk '{ print $2 }' "$uris" | while read -r name; do
        [[ $name == "$first" ]] || printf '%s\0' "$pool/$name"
    done | xargs -0 --no-run-if-empty -n 1 -P "$(nproc)" bash -c 'set -eo pipefail; unpack_one "$1" "$0"' "$dir"
    remove_tree "$pool"
}

unpack_one() {
    dpkg-deb --fsys-tarfile "$1" | tar -C "$2" -x --keep-directory-symlink --no-same-owner --no-same-permissions \
        --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' --exclude='./usr/share/info/*' ||
        { echo "cannot unpack $1" >&2; return 1; }
}

download_packages() {
    local uris=$1 pool=$2 uri name size sum wanted=() mib
    while read -r uri name size sum; do
        # A file of the right size may still be a wrong one.
        if [[ -f $pool/$name && $(stat -c %s "$pool/$name") == "$size" ]] &&
            [[ $(sha256sum <"$pool/$name") == "${sum#SHA256:}  -" ]]; then
            continue
        fi
        rm -f "$pool/$name"
        uri=${uri#\'}
        wanted+=("${uri%\'}" "$pool/$name" "$sum")
        mib=$((${mib:-0} + size / 1024))
    done <"$uris"
    ((${#wanted[@]})) || return 0
    echo "downloading $((${#wanted[@]} / 3)) packages, $((mib / 1024)) MiB"
    write_apt_config "$pool/apt" "http://unused.invalid"
    if ! apt_private "$pool/apt" /usr/lib/apt/apt-helper download-file "${wanted[@]}"; then
        echo "reason: a download failed; run again to go on where it was, or 'images/setup --update' if the mirror no longer has these versions"
        return 1
    fi
}
