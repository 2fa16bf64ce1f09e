package spireapi

import (
	"slices"
	"sort"
)

// pageSize is the most that one response lists.
const pageSize = 500

// paginate returns the page of all, which is sorted by key, that follows token, and the token of the next page.
func paginate[T any](all []T, key func(T) string, size int32, token string) (page []T, next string) {
	n := int(size)
	if n <= 0 || n > pageSize {
		n = pageSize
	}
	from := 0
	if token != "" {
		from = sort.Search(len(all), func(i int) bool { return key(all[i]) > token })
	}
	page = all[from:]
	if len(page) > n {
		page = page[:n]
		next = key(page[n-1])
	}
	return page, next
}

// The values of SelectorMatch.MatchBehavior and FederatesWithMatch.MatchBehavior, which agree.
const (
	matchExact    = 0
	matchSubset   = 1
	matchSuperset = 2
	matchAny      = 3
)

// matchSet compares what a candidate has with what a filter names.
func matchSet(behavior int32, have, want []string) bool {
	switch behavior {
	case matchExact:
		return sameSet(have, want)
	case matchSubset:
		return len(have) > 0 && subset(have, want)
	case matchSuperset:
		return subset(want, have)
	case matchAny:
		return slices.ContainsFunc(want, func(w string) bool { return slices.Contains(have, w) })
	}
	return false
}
