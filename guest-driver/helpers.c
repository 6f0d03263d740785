// SPDX-License-Identifier: GPL-2.0-only
/*
 * C functions for what Rust cannot call itself: static inline functions and macros of the kernel. Nothing is
 * decided here; each function does what its name says, and the Rust abstraction that calls it argues why it may.
 */
#include <linux/highmem.h>
#include <linux/hmm.h>
#include <linux/huge_mm.h>
#include <linux/ioport.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/pagemap.h>
#include <linux/scatterlist.h>
#include <linux/semaphore.h>
#include <linux/shrinker.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/workqueue.h>

#include "helpers.h"

/* hmm/range.rs writes these out, because bindgen cannot. */
static_assert(HMM_PFN_VALID == 1UL << 63);
static_assert(HMM_PFN_WRITE == 1UL << 62);
static_assert(HMM_PFN_ERROR == 1UL << 61);
static_assert(HMM_PFN_REQ_FAULT == HMM_PFN_VALID);
static_assert(HMM_PFN_REQ_WRITE == HMM_PFN_WRITE);
static_assert(HMM_PFN_ORDER_SHIFT == 53);
/* hmm/blocks.rs, and the windows of address_space.rs: a block is what one PMD maps. */
static_assert(HPAGE_PMD_ORDER == 9);

/* virtio */

int pinion_virtio_find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue **vqs,
			   void (*callback)(struct virtqueue *vq))
{
	static const char * const names[] = { "control", "invalidate", "event" };
	struct virtqueue_info info[PINION_MAX_QUEUES] = {};
	unsigned int i;

	if (WARN_ON_ONCE(count > PINION_MAX_QUEUES))
		return -EINVAL;
	for (i = 0; i < count; i++) {
		info[i].name = i < ARRAY_SIZE(names) ? names[i] : "ring";
		info[i].callback = callback;
	}
	return virtio_find_vqs(vdev, count, vqs, info, NULL);
}

void pinion_virtio_del_vqs(struct virtio_device *vdev)
{
	vdev->config->del_vqs(vdev);
}

void pinion_virtio_device_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

void pinion_virtio_read_config(struct virtio_device *vdev, void *buf, size_t len)
{
	virtio_cread_bytes(vdev, 0, buf, len);
}

bool pinion_virtio_get_shm_region(struct virtio_device *vdev, u8 id, u64 *start, u64 *size)
{
	struct virtio_shm_region region;

	if (!virtio_get_shm_region(vdev, &region, id))
		return false;
	*start = region.addr;
	*size = region.len;
	return true;
}

void *pinion_virtio_get_private(struct virtio_device *vdev)
{
	return smp_load_acquire(&vdev->priv);
}

void pinion_virtio_set_private(struct virtio_device *vdev, void *private)
{
	smp_store_release(&vdev->priv, private);
}

struct device *pinion_virtio_device(struct virtio_device *vdev)
{
	return &vdev->dev;
}

struct virtio_device *pinion_virtqueue_device(struct virtqueue *vq)
{
	return vq->vdev;
}

unsigned int pinion_virtqueue_index(struct virtqueue *vq)
{
	return vq->index;
}

int pinion_virtqueue_add(struct virtqueue *vq, void *out, size_t out_len, void *in, size_t in_len, void *token)
{
	struct scatterlist out_sg, in_sg, *sgs[2];
	unsigned int outs = 0, ins = 0;

	if (out_len) {
		sg_init_one(&out_sg, out, out_len);
		sgs[outs++] = &out_sg;
	}
	if (in_len) {
		sg_init_one(&in_sg, in, in_len);
		sgs[outs + ins++] = &in_sg;
	}
	/* The device does not offer indirect descriptors, so this allocates nothing. */
	return virtqueue_add_sgs(vq, sgs, outs, ins, token, GFP_ATOMIC);
}

/* Completions */

void pinion_init_completion(struct completion *done)
{
	init_completion(done);
}

void pinion_reinit_completion(struct completion *done)
{
	reinit_completion(done);
}

void pinion_sema_init(struct semaphore *sem, int count)
{
	sema_init(sem, count);
}

/* Shrinkers */

struct shrinker *pinion_shrinker_register(const char *name, pinion_shrinker_fn *count, pinion_shrinker_fn *scan, void *data)
{
	struct shrinker *shrinker = shrinker_alloc(0, "%s", name);

	if (!shrinker)
		return NULL;
	shrinker->count_objects = count;
	shrinker->scan_objects = scan;
	shrinker->private_data = data;
	shrinker_register(shrinker);
	return shrinker;
}

void *pinion_shrinker_data(struct shrinker *shrinker)
{
	return shrinker->private_data;
}

unsigned long pinion_shrink_wanted(struct shrink_control *control)
{
	return control->nr_to_scan;
}

/* Work queues */

struct workqueue_struct *pinion_alloc_workqueue(bool reclaim)
{
	return alloc_workqueue("pinion", WQ_UNBOUND | WQ_HIGHPRI | (reclaim ? WQ_MEM_RECLAIM : 0), 0);
}

/* MMU notifiers */

void pinion_interval_set_seq(struct mmu_interval_notifier *notifier, unsigned long seq)
{
	mmu_interval_set_seq(notifier, seq);
}

bool pinion_interval_read_retry(struct mmu_interval_notifier *notifier, unsigned long seq)
{
	return mmu_interval_read_retry(notifier, seq);
}

/* Pages */

struct page *pinion_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long pinion_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

void pinion_get_page(struct page *page)
{
	get_page(page);
}

void pinion_put_page(struct page *page)
{
	put_page(page);
}

void pinion_lock_page(struct page *page)
{
	lock_page(page);
}

void pinion_unlock_page(struct page *page)
{
	unlock_page(page);
}

bool pinion_page_is_anon(struct page *page)
{
	return folio_test_anon(page_folio(page));
}

bool pinion_page_is_ksm(struct page *page)
{
	return folio_test_ksm(page_folio(page));
}

bool pinion_pfn_is_zero(unsigned long pfn)
{
	return is_zero_pfn(pfn);
}

bool pinion_page_may_pin(struct page *page)
{
	struct folio *folio = page_folio(page);

	return folio_test_anon(folio) && !folio_test_ksm(folio) && !folio_maybe_dma_pinned(folio) &&
	       !folio_is_zone_movable(folio);
}

bool pinion_page_is_mapped(struct page *page)
{
	return folio_mapped(page_folio(page));
}

void pinion_page_mark_dirty(struct page *page)
{
	struct folio *folio = page_folio(page);

	/* Other folios are dirtied by page_mkwrite(); their dirty_folio() may allocate. */
	if (folio_test_anon(folio) || folio_test_swapbacked(folio))
		folio_mark_dirty(folio);
}

void pinion_page_clear_mapping(struct page *page)
{
	page_folio(page)->mapping = NULL;
}

struct dev_pagemap *pinion_device_pagemap(struct page *page)
{
	return is_device_private_page(page) || is_device_coherent_page(page) ? page_pgmap(page) : NULL;
}

bool pinion_page_is_device_coherent(struct page *page)
{
	return is_device_coherent_page(page);
}

u64 pinion_page_peek(struct page *page)
{
	return READ_ONCE(*(u64 *)page_address(page));
}

struct page *pinion_folio_page(struct folio *folio)
{
	return &folio->page;
}

unsigned int pinion_page_order(struct page *page)
{
	return folio_order(page_folio(page));
}

unsigned long pinion_totalram_pages(void)
{
	return totalram_pages();
}

struct page *pinion_alloc_vma_page(struct vm_area_struct *vma, unsigned long address, unsigned int order)
{
	gfp_t gfp = order ? GFP_TRANSHUGE_LIGHT | __GFP_NORETRY | __GFP_NOWARN : GFP_HIGHUSER_MOVABLE;
	struct folio *folio = vma_alloc_folio(gfp, order, vma, ALIGN_DOWN(address, PAGE_SIZE << order));

	if (!folio)
		return NULL;
	folio_lock(folio);
	return folio_page(folio, 0);
}

struct page *pinion_alloc_page(unsigned int order)
{
	struct folio *folio = folio_alloc(order ? GFP_TRANSHUGE : GFP_HIGHUSER_MOVABLE, order);

	if (!folio)
		return NULL;
	folio_lock(folio);
	return folio_page(folio, 0);
}

void pinion_clear_pages(struct page *page, unsigned int order)
{
	unsigned int i;

	for (i = 0; i < 1U << order; i++)
		clear_highpage(page + i);
}

bool pinion_vma_is_shared(struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_SHARED;
}

bool pinion_vma_is_writable(struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_WRITE;
}

bool pinion_vma_may_have_huge_pages(struct vm_area_struct *vma)
{
	return !vma_thp_disabled(vma, vma->vm_flags, false);
}

/* Memory of devices */

struct resource *pinion_request_free_mem_region(unsigned long size, const char *name)
{
	return request_free_mem_region(&iomem_resource, size, name);
}

bool pinion_request_mem_region(unsigned long start, unsigned long size, const char *name)
{
	return request_mem_region(start, size, name);
}

void pinion_release_mem_region(unsigned long start, unsigned long size)
{
	release_mem_region(start, size);
}

void pinion_zone_device_page_init(struct page *page, struct dev_pagemap *pgmap, unsigned int order)
{
	/* Not page_folio(): the page may have been the tail of a folio that is gone. */
	zone_device_folio_init((struct folio *)page, pgmap, order);
}

int pinion_numa_node(void)
{
	return numa_node_id();
}
