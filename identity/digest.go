package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"slices"
)

// Digest is the SHA-256 over a set of authorities, in whatever order they come.
func Digest(authorities []*x509.Certificate) []byte {
	sums := make([][]byte, len(authorities))
	for i, c := range authorities {
		sum := sha256.Sum256(c.Raw)
		sums[i] = sum[:]
	}
	slices.SortFunc(sums, bytes.Compare)
	all := sha256.Sum256(bytes.Join(slices.CompactFunc(sums, bytes.Equal), nil))
	return all[:]
}
