// SPDX-License-Identifier: GPL-2.0
/*
 * lapic_khz=: the rate of the local APIC's timer, for machines whose maker knows it.
 *
 * Without it the kernel measures the rate for 110 ms and checks what it found for another 110 ms
 * (calibrate_APIC_clock). An emulated timer has a fixed rate, and measuring it on a busy host gives
 * a wrong one.
 */
#include <linux/errno.h>
#include <linux/init.h>
#include <linux/kernel.h>
#include <asm/apic.h>

static int __init set_lapic_khz(char *value)
{
	unsigned int khz;

	/* The product has to fit into 32 bits; no timer is beyond these bounds. */
	if (!value || kstrtouint(value, 10, &khz) || khz < 1000 || khz > 20000000)
		return -EINVAL;
	lapic_timer_period = khz * (1000 / HZ);
	return 0;
}
early_param("lapic_khz", set_lapic_khz);
