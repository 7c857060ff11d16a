#!/usr/bin/env bash
# Usage: docker/sshd.sh
#
# Becomes the ssh server of a node. ~/.ssh is a volume that the nodes of one job share, and nobody else: the first node
# makes the key pairs of the user and of the server there, so no image holds a private key.
set -euo pipefail

cd ~/.ssh
exec 9>lock
flock 9
if [[ ! -f known_hosts ]]; then
  rm -f id_ed25519 host_key # of a start that was broken off
  ssh-keygen -q -t ed25519 -N '' -C syncbn -f id_ed25519
  ssh-keygen -q -t ed25519 -N '' -C syncbn -f host_key
  cp id_ed25519.pub authorized_keys
  echo "* $(<host_key.pub)" >known_hosts # last, as it stands for all of them
fi
exec 9>&-
exec /usr/sbin/sshd -D -e
