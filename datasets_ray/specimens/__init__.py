"""A miniature world of procedurally drawn species: images, captions, documents, conversations and questions, all from seeds."""
