#!/usr/bin/env bash
# Usage: srun --kill-on-bad-exit=1 launch/slurm-task.sh COMMAND ...
#
# What each task of the SLURM scripts runs: the command, whose failure is passed on half a second later. srun ends the
# other tasks at once, and then loses what the failed one wrote last, its error message, in one of four jobs.
set -uo pipefail

# SLURM signals the command, too; this waits for it. Other tasks are terminated because of one that failed: srun reports
# the highest status, and so, with the lowest here, that one's.
terminated=''
trap : HUP INT USR1 USR2
trap 'terminated=yes' TERM

exec 3>&2 2>/dev/null # bash's own notices of signals
"$@" 2>&3 3>&- && exit
status=$?
read -rt 0.5 <> <(:) # half a second, without a process to terminate
[[ ! $terminated ]] || status=1
exit "$status"
