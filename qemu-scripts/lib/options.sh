# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
#
# What is to be known of the options of qemu-scripts/run by others, too.

# takes_value OPTION: whether the word after it is its value.
takes_value() {
    case $1 in
    --kernel | --add | --memory | --cpus | --devices | --rings | --device-option | --driver-option | --append | --disk | --timeout | --log) ;;
    *) return 1 ;;
    esac
}
