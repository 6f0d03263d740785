// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/module/pinion/parameters/pin_method: how this build keeps a page pinned in place. It follows from the
 * kernel that the module was built for, so it can be read and not set.
 */
#include <linux/migrate.h>
#include <linux/module.h>

static int pin_method_get(char *buffer, const struct kernel_param *parameter)
{
#ifdef PINION_HAS_MIGRATE_PFN_PIN
	return sysfs_emit(buffer, "migrate_pfn_pin\n");
#else
	return sysfs_emit(buffer, "takeover\n");
#endif
}

static int pin_method_set(const char *value, const struct kernel_param *parameter)
{
	pr_err("pinion: pin_method follows from the kernel's headers and cannot be set\n");
	return -EPERM;
}

static const struct kernel_param_ops pin_method_ops = {
	.get = pin_method_get,
	.set = pin_method_set,
};

module_param_cb(pin_method, &pin_method_ops, NULL, 0444);
MODULE_PARM_DESC(pin_method, "How pages are pinned in place: migrate_pfn_pin or takeover (read-only)");
