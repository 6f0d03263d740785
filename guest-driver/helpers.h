/* SPDX-License-Identifier: GPL-2.0-only */
/* See helpers.c. */
#ifndef _PINION_HELPERS_H
#define _PINION_HELPERS_H

#include <linux/types.h>

struct completion;
struct dev_pagemap;
struct device;
struct folio;
struct mmu_interval_notifier;
struct page;
struct resource;
struct semaphore;
struct virtio_device;
struct vm_area_struct;
struct virtqueue;
struct workqueue_struct;

/* Three queues and at most 16 rings: abi/src/wire.rs. */
#define PINION_MAX_QUEUES	19

int pinion_virtio_find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue **vqs,
			   void (*callback)(struct virtqueue *vq));
void pinion_virtio_del_vqs(struct virtio_device *vdev);
void pinion_virtio_device_ready(struct virtio_device *vdev);
void pinion_virtio_read_config(struct virtio_device *vdev, void *buf, size_t len);
bool pinion_virtio_get_shm_region(struct virtio_device *vdev, u8 id, u64 *start, u64 *size);
void *pinion_virtio_get_private(struct virtio_device *vdev);
void pinion_virtio_set_private(struct virtio_device *vdev, void *private);
struct device *pinion_virtio_device(struct virtio_device *vdev);
struct virtio_device *pinion_virtqueue_device(struct virtqueue *vq);
unsigned int pinion_virtqueue_index(struct virtqueue *vq);
int pinion_virtqueue_add(struct virtqueue *vq, void *out, size_t out_len, void *in, size_t in_len, void *token);

void pinion_init_completion(struct completion *done);
void pinion_reinit_completion(struct completion *done);

void pinion_sema_init(struct semaphore *sem, int count);

struct shrinker;
struct shrink_control;
typedef unsigned long pinion_shrinker_fn(struct shrinker *shrinker, struct shrink_control *control);
struct shrinker *pinion_shrinker_register(const char *name, pinion_shrinker_fn *count, pinion_shrinker_fn *scan, void *data);
void *pinion_shrinker_data(struct shrinker *shrinker);
unsigned long pinion_shrink_wanted(struct shrink_control *control);

struct workqueue_struct *pinion_alloc_workqueue(bool reclaim);

void pinion_interval_set_seq(struct mmu_interval_notifier *notifier, unsigned long seq);
bool pinion_interval_read_retry(struct mmu_interval_notifier *notifier, unsigned long seq);

struct page *pinion_pfn_to_page(unsigned long pfn);
unsigned long pinion_page_to_pfn(struct page *page);
void pinion_get_page(struct page *page);
void pinion_put_page(struct page *page);
void pinion_lock_page(struct page *page);
void pinion_unlock_page(struct page *page);
bool pinion_page_is_anon(struct page *page);
bool pinion_page_is_ksm(struct page *page);
bool pinion_pfn_is_zero(unsigned long pfn);
bool pinion_page_may_pin(struct page *page);
bool pinion_page_is_mapped(struct page *page);
void pinion_page_mark_dirty(struct page *page);
void pinion_page_clear_mapping(struct page *page);
struct dev_pagemap *pinion_device_pagemap(struct page *page);
bool pinion_page_is_device_coherent(struct page *page);
u64 pinion_page_peek(struct page *page);
struct page *pinion_folio_page(struct folio *folio);
unsigned int pinion_page_order(struct page *page);
unsigned long pinion_totalram_pages(void);
struct page *pinion_alloc_vma_page(struct vm_area_struct *vma, unsigned long address, unsigned int order);
struct page *pinion_alloc_page(unsigned int order);
void pinion_clear_pages(struct page *page, unsigned int order);
bool pinion_vma_is_shared(struct vm_area_struct *vma);
bool pinion_vma_is_writable(struct vm_area_struct *vma);
bool pinion_vma_may_have_huge_pages(struct vm_area_struct *vma);

struct resource *pinion_request_free_mem_region(unsigned long size, const char *name);
bool pinion_request_mem_region(unsigned long start, unsigned long size, const char *name);
void pinion_release_mem_region(unsigned long start, unsigned long size);
void pinion_zone_device_page_init(struct page *page, struct dev_pagemap *pgmap, unsigned int order);
int pinion_numa_node(void);

#endif /* _PINION_HELPERS_H */
