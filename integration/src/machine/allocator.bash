#!/bin/bash
# A stand-in for the stock nitro-enclaves-allocator on a machine whose sysfs is a tree of files. It reads its file as strictly, gives
# all reserved memory back first, takes large pages first, refuses while an enclave runs, and takes nothing where it can't take all.
#
# /run/standin/memory_mib: how much can be had as hugepages, if not all of 4096 MiB.
set -u

file=/etc/nitro_enclaves/allocator.yaml
sys=/run/standin/sys
pages=$sys/devices/system/node/node0/hugepages

fail() {
    echo "Error: $*" >&2
    exit 1
}

# Line by line, as a shell reads: what follows the last newline is lost.
memory='' count='' pool='' number=0
while IFS= read -r line; do
    number=$((number + 1))
    if [ $number = 1 ]; then
        [ "$line" = '---' ] || fail "the configuration file does not begin with ---"
        continue
    fi
    case "$line" in
        '#'*) continue ;;
        'memory_mib: '*) memory=${line#*: } ;;
        'cpu_count: '*) count=${line#*: } ;;
        'cpu_pool: '*) pool=${line#*: } ;;
        *) fail "line $number of the configuration file is invalid: $line" ;;
    esac
done <"$file" || fail "no configuration file"

[[ $memory =~ ^[0-9]+$ ]] || fail "memory_mib is missing or no number: $memory"
if [ -n "$count" ] && [ -n "$pool" ]; then fail "both cpu_count and cpu_pool are given"; fi
if [ -z "$count$pool" ]; then fail "neither cpu_count nor cpu_pool is given"; fi

pgrep -f __enclave-process >/dev/null && fail "Could not re-online CPUs: an enclave runs"

# All CPUs, and those of the cores that may be taken: whole ones, without that of CPU 0. Siblings are half of all CPUs apart.
last=$(cut -d- -f2 "$sys/devices/system/cpu/present")
half=$(((last + 1) / 2))
chosen=()
if [ -n "$count" ]; then
    [[ $count =~ ^[0-9]+$ ]] || fail "cpu_count is no number: $count"
    if [ $((count % 2)) != 0 ] || [ "$count" -gt $(((half - 1) * 2)) ]; then fail "cpu_count can't be had in whole cores: $count"; fi
    for ((core = 1; ${#chosen[@]} < count; core++)); do chosen+=("$core" $((core + half))); done
else
    IFS=, read -ra parts <<<"$pool"
    for part in "${parts[@]}"; do
        [[ $part =~ ^([0-9]+)(-([0-9]+))?$ ]] || fail "cpu_pool is no list of CPUs: $pool"
        for ((cpu = BASH_REMATCH[1]; cpu <= ${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}; cpu++)); do chosen+=("$cpu"); done
    done
    for cpu in "${chosen[@]}"; do
        if [ "$cpu" -gt "$last" ] || [ $((cpu % half)) = 0 ]; then fail "CPU $cpu can't be taken"; fi
        case " ${chosen[*]} " in *" $(((cpu + half) % (last + 1))) "*) ;; *) fail "CPU $cpu is half a core" ;; esac
    done
fi

set_pages() { # the folder of a size, how many
    echo "$2" >"$1/nr_hugepages"
    echo "$2" >"$1/free_hugepages"
}

take_cpus() {
    local online=() cpu
    for ((cpu = 0; cpu <= last; cpu++)); do
        case " $* " in *" $cpu "*) ;; *) online+=("$cpu") ;; esac
    done
    printf '%s\n' "${online[@]}" | paste -sd, | tee "$sys/devices/system/cpu/online" >"$sys/devices/system/node/node0/cpulist"
    printf '%s\n' "$@" | sort -n | paste -sd, >"$sys/module/nitro_enclaves/parameters/ne_cpus"
}

# Everything is given back before anything is taken.
take_cpus
for size in "$pages"/hugepages-*; do set_pages "$size" 0; done

there=$(cat /run/standin/memory_mib 2>/dev/null || echo 4096)
left=$memory
for size in $(ls "$pages" | sed -n 's/^hugepages-\([0-9]*\)kB$/\1/p' | sort -rn); do
    mib=$((size / 1024))
    number=$((left / mib))
    if [ $((number * mib)) -gt "$there" ]; then number=$((there / mib)); fi
    set_pages "$pages/hugepages-${size}kB" $number
    left=$((left - number * mib)) there=$((there - number * mib))
done
if [ "$left" -gt 0 ]; then
    for size in "$pages"/hugepages-*; do set_pages "$size" 0; done
    fail "Failed to reserve $memory MB of memory for enclaves: insufficient huge pages, $left MB short"
fi
take_cpus "${chosen[@]}"
echo "Successfully allocated memory: $memory MB, CPUs: ${chosen[*]}"
