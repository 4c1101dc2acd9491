#!/usr/bin/env bash
# Finds, or on Debian installs, a Vulkan driver that computes on the CPU (lavapipe of Mesa), and prints
# the environment in which it is the only one:  eval "$(scripts/vulkan.sh)"
#
# Set VK_DRIVER_FILES yourself to use another driver, your card's say.
set -euo pipefail

package=mesa-vulkan-drivers

say() { printf 'vulkan: %s\n' "$*" >&2; }

manifest() {
  local file
  for file in /usr/share/vulkan/icd.d/lvp_icd*.json; do
    if [ -f "$file" ]; then
      printf '%s\n' "$file"
      return
    fi
  done
}

if [ -z "${VK_DRIVER_FILES:-}" ]; then
  VK_DRIVER_FILES=$(manifest)
  if [ -z "$VK_DRIVER_FILES" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      say "there is no software Vulkan driver here; install Mesa's (on Debian: sudo apt-get install $package), or set VK_DRIVER_FILES to another's manifest"
      exit 1
    fi
    say "installing $package, Debian's Vulkan drivers, with apt-get"
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$package" >&2
    VK_DRIVER_FILES=$(manifest)
  fi
fi
say "driver $VK_DRIVER_FILES"
# The second name is the one that older loaders know.
printf 'export VK_DRIVER_FILES=%q VK_ICD_FILENAMES=%q\n' "$VK_DRIVER_FILES" "$VK_DRIVER_FILES"
