"""IEMOCAP: ten actors in pairs, six or four emotions (doi 10.1007/s10579-008-9076-6)."""
